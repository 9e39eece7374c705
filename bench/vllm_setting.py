"""A backbone on disk, a store of random prefixes over it, and vLLM over both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import fastprompt as fp
from bench.backbones import INIT_STD, LlamaSize, llama
from fastprompt.integrations.vllm import PrefixStore, transfer_config
from fastprompt.integrations.vllm.export import Compiler, prepare_store, store_prefix
from fastprompt.integrations.vllm.store import Entry

PAGE = 32  # tokens


@dataclass(frozen=True)
class Size:
    """How large a case is; `cache` is for vLLM's pages, in bytes."""

    backbone: LlamaSize
    lengths: tuple[int, ...] = (64,)
    prompts: int = 8
    rows: int = 32
    text: int = 33
    new: int = 32
    rounds: int = 9
    cache: int = 512 << 20
    requests: int = 0


@dataclass
class Setting:
    """A backbone on disk, a store of random prefixes over it, and the model that they can be checked with."""

    size: Size
    model: fp.PromptedModel
    backbone: Path
    store: PrefixStore
    names: list[str]

    def engine(self, prompted: bool) -> Any:
        """vLLM over the backbone, with the connector or without."""
        from vllm import LLM

        connector = {"kv_transfer_config": transfer_config(self.store.folder)} if prompted else {}
        return LLM(
            model=str(self.backbone),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=512,
            max_num_seqs=64,
            block_size=PAGE,
            kv_cache_memory_bytes=self.size.cache,
            **connector,
        )

    def expected(self, name: str, text: list[int]) -> list[int]:
        """What the model says under a prompt, read from its prefix in the store."""
        mapped = self.store.map(self.store.current(name).digest)
        prefix = torch.cat([t.permute(1, 0, 2, 3).flatten(1) for t in _interleaved(mapped.keys, mapped.values)], 1)
        config = fp.PrefixTuning(num_virtual_tokens=mapped.length)
        self.model.add_prompt("checked", config.restore(self.model._info.spec, prefix))
        ids = torch.tensor([text])
        with torch.no_grad():
            out = self.model.generate(ids, prompts="checked", max_new_tokens=self.size.new, do_sample=False)
        self.model.remove_prompt("checked")
        answer: list[int] = out[0, len(text) :].tolist()
        return answer


def _interleaved(keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values `[1, P, Hkv, D]` of layer after layer."""
    return [side[i : i + 1] for i in range(keys.shape[0]) for side in (keys, values)]


@contextmanager
def setting(size: Size) -> Iterator[Setting]:
    """A setting of random weights in a folder of its own; its prompts' lengths take turns."""
    model = fp.PromptedModel(llama(size.backbone))
    with TemporaryDirectory() as folder:
        backbone, store = Path(folder, "backbone"), PrefixStore(Path(folder, "store"))
        model.backbone.save_pretrained(backbone)
        prepare_store(store, str(backbone), Compiler(lambda: model.backbone))
        names = [f"p{i:05}" for i in range(size.prompts)]
        for i, name in enumerate(names):
            length = size.lengths[i % len(size.lengths)]
            built = fp.PrefixTuning(num_virtual_tokens=length, init_std=INIT_STD).build(model._info.spec, seed=i)
            with torch.no_grad():
                digest = store_prefix(store, built())
            store.set_name(name, Entry(digest, length, str(i), "prefix_tuning", "prefix", 0, None, 0.0))
        yield Setting(size, model, backbone, store, names)
