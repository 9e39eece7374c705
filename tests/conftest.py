"""What every test runs under: no hub, one thread, the same seed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from op_cases import VARIANTS, running

torch.set_num_threads(1)
settings.register_profile("fastprompt", deadline=None, print_blob=True)
settings.register_profile("sanitized", settings.get_profile("fastprompt"), max_examples=40)  # for `make sanitize`
settings.load_profile("fastprompt")


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=VARIANTS)
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation that runs here, the native one with every instruction set that this processor has."""
    with running(request.param) as name:
        yield name
