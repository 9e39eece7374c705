"""What every test runs under: no hub, one thread, the same seed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from fastprompt import native

torch.set_num_threads(1)
settings.register_profile("fastprompt", deadline=None, print_blob=True)
settings.load_profile("fastprompt")


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)


def _implementations() -> list[str]:
    return ["reference", *([] if native.obstacle() else [f"cpu-{isa}" for isa in native.load().isas()])]


@pytest.fixture(params=_implementations())
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation that runs here, the native one with every instruction set that this processor has."""
    name, _, isa = request.param.partition("-")
    if not isa:
        yield name
        return
    usual = native.load().isa()
    native.load().use_isa(isa)
    yield name
    native.load().use_isa(usual)
