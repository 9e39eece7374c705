"""What every test runs under: no hub, one thread, the same seed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("fastprompt", deadline=None, print_blob=True)
settings.load_profile("fastprompt")


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)
