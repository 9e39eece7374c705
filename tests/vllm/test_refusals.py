"""What prompts would be wrong under is refused when the engine starts, in words."""

import pytest
import vllm_cases
from vllm_cases import connector_options, engine

from fastprompt import PrefixTuning, PromptedModel
from fastprompt.errors import ArgumentError, FastPromptError, IncompatiblePromptError, PromptFileError, UnsupportedError
from fastprompt.integrations.vllm import versions
from fastprompt.integrations.vllm.export import StoreBackbone
from fastprompt.integrations.vllm.store import PrefixStore


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    served = vllm_cases.serve(tmp_path_factory.mktemp("plain"), lengths=())
    served.add("a", PrefixTuning(num_virtual_tokens=8))
    served.export()
    return served


def refused(served, error: type[FastPromptError], match: str, **options) -> None:
    with pytest.raises(error, match=match), engine(served, **options):
        pass


def test_a_transfer_that_would_go_on_without_the_prompt(plain):
    config = connector_options(plain)["kv_transfer_config"] | {"kv_load_failure_policy": "recompute"}
    said = "kv_load_failure_policy is 'recompute', expected 'fail'"
    refused(plain, ArgumentError, said, kv_transfer_config=config)


def test_a_model_that_embeds(plain):
    refused(plain, ArgumentError, "runner is 'pooling', expected 'generate'", runner="pooling")


def test_no_secret(plain, monkeypatch):
    monkeypatch.delenv("FASTPROMPT_VLLM_SECRET")
    refused(plain, ArgumentError, "FASTPROMPT_VLLM_SECRET")


def test_a_store_of_another_backbone(plain, tmp_path):
    held = plain.store.backbone()
    fields = held.spec.to_dict() | {"hidden_size": 64}
    other = PrefixStore(tmp_path / "other")
    other.open_for(StoreBackbone("elsewhere", "float32", type(held.spec).from_dict(fields)))
    config = connector_options(plain)["kv_transfer_config"] | {
        "kv_connector_extra_config": {"store": str(other.folder)}
    }
    refused(plain, IncompatiblePromptError, "hidden size 128 here, 64 there", kv_transfer_config=config)


def test_no_store(plain, tmp_path):
    config = connector_options(plain)["kv_transfer_config"] | {"kv_connector_extra_config": {"store": str(tmp_path)}}
    refused(plain, PromptFileError, "export prompts into it", kv_transfer_config=config)


def test_a_version_that_nobody_tried(plain, monkeypatch):
    import vllm

    for version in ("0.27.1", "0.33.0", "1.0.0", "a branch"):
        monkeypatch.setattr(vllm, "__version__", version)
        with pytest.raises(UnsupportedError, match=f"vllm is version {version}, expected"):
            versions.check_installed()
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    refused(plain, UnsupportedError, "vllm is version 0.33.0, expected")


@pytest.mark.parametrize(("kind", "match"), [("window", "SlidingWindowSpec"), ("hybrid", "[23] groups of pages")])
def test_sliding_windows(tmp_path, kind, match):
    """A window would leave the prefix behind; a store for such a backbone can be made, an engine cannot be started."""
    served = vllm_cases.Served(tmp_path, PromptedModel(vllm_cases.make_backbone(tmp_path / vllm_cases.NAME, kind)))
    served.add("a", PrefixTuning(num_virtual_tokens=8))
    served.export()
    refused(served, UnsupportedError, match)
    refused(served, UnsupportedError, "a window of 48|groups", disable_hybrid_kv_cache_manager=True)
