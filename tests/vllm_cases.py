"""A tiny backbone on disk, prompts of every kind over it, and the vLLM engine that serves them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zoo
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import fastprompt
from fastprompt import PrefixTuning, PromptedModel, PromptTuning, PTuning
from fastprompt.integrations.vllm import PrefixStore, transfer_config
from fastprompt.integrations.vllm.export import Compiler, export_folder, prepare_store

SECRET = "a secret of the tests, long enough"
VOCAB, LENGTHS, NAME = 512, (1, 16, 20, 32, 64, 100, 300), "backbone"
NOISE = 1.0  # added to prompts' weights: enough that hardly two of them answer alike
_SIZES = dict(  # vLLM's kernels need heads of 32 at least
    vocab_size=VOCAB,
    hidden_size=128,
    intermediate_size=256,
    head_dim=32,
    max_position_embeddings=1024,
    eos_token_id=None,
    pad_token_id=None,
    tie_word_embeddings=False,
)
_HYBRID = ["sliding_attention", "full_attention", "sliding_attention"]
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa": ("llama", {}),
    "mha": ("llama", dict(num_key_value_heads=4)),
    "window": ("mistral_window", dict(sliding_window=48)),
    "hybrid": ("gemma3_text", dict(sliding_window=48, query_pre_attn_scalar=32, layer_types=_HYBRID)),
}
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def make_backbone(folder: Path, kind: str, **sizes: Any) -> Any:
    """A backbone of random weights with a tokenizer of words `w3` to `w511`; returns the model."""
    name, changes = BACKBONES[kind]
    model = zoo.causal(name, **(_SIZES | changes | sizes))
    model.save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, model.config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT
    made.save_pretrained(folder)
    return model


@dataclass
class Served:
    """A backbone's folder, its prompts' folder, their store, and the reference: the same prompts over transformers."""

    folder: Path
    model: PromptedModel
    names: list[str] = field(default_factory=list)

    @property
    def backbone(self) -> Path:
        return self.folder / NAME

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts"

    @property
    def store(self) -> PrefixStore:
        return PrefixStore(self.folder / "store")

    def add(self, name: str, config: Any, seed: int = 0, overwrite: bool = False, save: bool = True) -> None:
        """A new prompt, or another one under a known name, saved to the folder of prompts unless told otherwise."""
        if name in self.model.prompt_names:
            self.model.remove_prompt(name)
        prompt = self.model.add_prompt(name, config, seed=seed)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in prompt.parameters():
                weight.add_(torch.randn(weight.shape, generator=noise) * NOISE)
        if save:
            self.model.save_prompt(name, self.prompts / name, overwrite=overwrite)
        if name not in self.names:
            self.names.append(name)

    def export(self) -> None:
        """Bring the store up to date."""
        compiler = Compiler(lambda: AutoModelForCausalLM.from_pretrained(self.backbone, dtype=torch.float32))
        prepare_store(self.store, str(self.backbone), compiler)
        _, refused = export_folder(self.store, self.prompts, compiler)
        assert not refused, refused

    @torch.no_grad()
    def expected(self, rows: Sequence[tuple[str | None, tuple[int, ...]]], new_tokens: int) -> list[list[int]]:
        """What greedy `PromptedModel.generate` continues (prompt, text) pairs with, one batch for each text length."""
        by_length: dict[int, list[int]] = {}
        for i, (_, text) in enumerate(rows):
            by_length.setdefault(len(text), []).append(i)
        answers: list[list[int]] = [[] for _ in rows]
        for length, places in by_length.items():
            ids = torch.tensor([rows[i][1] for i in places])
            out = self.model.generate(
                ids,
                prompts=[rows[i][0] for i in places],
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            for i, row in zip(places, out[:, length:].tolist(), strict=True):
                answers[i] = row
        return answers


def serve(folder: Path, kind: str = "gqa", lengths: Sequence[int] = LENGTHS, **sizes: Any) -> Served:
    """A backbone with a prefix, a prompt that is compiled and a P-Tuning prompt of every length, exported."""
    served = Served(folder, PromptedModel(make_backbone(folder / NAME, kind, **sizes)))
    for seed, length in enumerate(lengths):
        served.add(f"prefix{length}", PrefixTuning(num_virtual_tokens=length), seed)
        served.add(f"compiled{length}", PromptTuning(num_virtual_tokens=length), seed + 100)
        served.add(f"p{length}", PTuning(num_virtual_tokens=length), seed + 200)
    served.export()
    return served


def connector_options(served: Served, **more: Any) -> dict[str, Any]:
    """What every engine of the tests is started with."""
    return {
        "model": str(served.backbone),
        "served_model_name": NAME,
        "dtype": "float32",
        "max_model_len": 512,
        "block_size": 32,
        "kv_cache_memory_bytes": 32 << 20,
        "enforce_eager": True,
        "kv_transfer_config": transfer_config(served.store.folder),
    } | more


@contextmanager
def engine(served: Served, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` in this process, gone at the end, so that another one can start."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown

    llm = None
    try:
        llm = LLM(**connector_options(served, **options))
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        ensure_kv_transfer_shutdown()
        cleanup_dist_env_and_memory()


def generate(llm: Any, inputs: Sequence[dict[str, Any]], new_tokens: int, **params: Any) -> list[Any]:
    """What the engine answers greedily, in order."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, **params)
    return llm.generate(list(inputs), greedy, use_tqdm=False)


def tokens(outputs: Sequence[Any]) -> list[list[int]]:
    """The token ids of each answer."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def writer() -> Any:
    """What writes pages, of an engine in this process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().writer


def scheduler(llm: Any) -> Any:
    """The scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that runs vLLM."""
    paths = [str(Path(fastprompt.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "FASTPROMPT_VLLM_SECRET": SECRET} | more
