"""Reading a PEFT adapter folder as a prompt."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastprompt.errors import ArgumentError, IncompatiblePromptError, PromptFileError, UnsupportedError
from fastprompt.folders import current_folder
from fastprompt.peft_format.layout import CONFIG, HEADS, SEQ2SEQ, SUPPORTED, WEIGHTS, module_of, slot_pair
from fastprompt.prompts import Cartridge, PrefixTuning, PromptConfig, PromptHead, PromptTuning, PTuning, SoftPrompt
from fastprompt.spec import BackboneSpec, LayerShape
from fastprompt.store import other_format, read_tensors


@dataclass(frozen=True)
class _Adapter:
    """One adapter as its files hold it."""

    where: str
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    def number(self, name: str, default: int | None = None) -> int:
        value = self.config.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise PromptFileError(f"{self.where}/{CONFIG}: {name} is {value!r}, expected an int >= 0")
        return value

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise PromptFileError(f"{self.where}/{WEIGHTS} has no {name}, only {sorted(self.tensors)[:8]}")
        return self.tensors[name].to(torch.float32)

    @property
    def task_type(self) -> str | None:
        value = self.config.get("task_type")
        if value is not None and not isinstance(value, str):
            raise PromptFileError(f"{self.where}/{CONFIG}: task_type is {value!r}, expected a name or null")
        return value

    @property
    def saved_modules(self) -> Collection[str]:
        value = self.config.get("modules_to_save") or HEADS
        if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in value):
            raise PromptFileError(f"{self.where}/{CONFIG}: modules_to_save is {value!r}, expected names")
        return value

    @property
    def submodules(self) -> int:
        return self.number("num_transformer_submodules", 2 if self.task_type == SEQ2SEQ else 1)


def is_peft_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder with a PEFT adapter's config."""
    return (current_folder(path) / CONFIG).is_file()


def read_peft(path: str | os.PathLike[str], spec: BackboneSpec, *, task_id: int | None = None) -> SoftPrompt:
    """Read a PEFT prompt adapter for the backbone `spec`: trainable, float32, on the CPU.

    Semantics: the prompt acts as it does in PEFT, so an encoder-decoder's prefix holds what each decoder layer really
    reads and its embedding prompt the first P of 2P rows (for a multitask prompt that is PEFT's `generate`; its
    `forward` also puts the others before the decoder's text). A multitask prompt is
    `shared * (cols[task] @ rows[task])`.

    Args:
        task_id: which task of a MULTITASK_PROMPT_TUNING adapter; needed when it has several.
    Errors: PromptFileError for missing, altered or pickled files; IncompatiblePromptError where the shapes do not fit
    `spec`; UnsupportedError for an adapter that is not one of `SUPPORTED`.
    """
    folder = current_folder(path)
    config = adapter_config(_content(folder, CONFIG), str(folder / CONFIG))
    tensors = read_tensors(_content(folder, WEIGHTS), str(folder / WEIGHTS))
    return prompt_from_peft(config, tensors, spec, task_id=task_id, where=str(folder))


def prompt_from_peft_files(
    config: bytes, weights: bytes, spec: BackboneSpec, *, task_id: int | None = None, where: str = "the adapter"
) -> SoftPrompt:
    """As `read_peft`, from the contents of the two files; `where` names their folder in errors."""
    fields = adapter_config(config, f"{where}/{CONFIG}")
    return prompt_from_peft(fields, read_tensors(weights, f"{where}/{WEIGHTS}"), spec, task_id=task_id, where=where)


def prompt_from_peft(
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    spec: BackboneSpec,
    *,
    task_id: int | None = None,
    where: str = "the adapter",
) -> SoftPrompt:
    """As `read_peft`, from what the two files hold: the config's fields and the tensors by name."""
    adapter = _Adapter(where, {k: getattr(v, "value", v) for k, v in config.items()}, tensors)
    kind = adapter.config.get("peft_type")
    if kind not in SUPPORTED:
        raise UnsupportedError(
            f"{where} has peft_type {kind!r}, expected one of {', '.join(SUPPORTED)}: load any other kind, such as "
            "LORA, onto the backbone itself with PEFT, and prompts on top"
        )
    if task_id is not None and kind != "MULTITASK_PROMPT_TUNING":
        raise ArgumentError(f"task_id is {task_id!r}, but {where} is {kind}, which has no tasks: pass None")
    ours = _read_config(adapter)
    ours.prefix_layers(spec)
    weights = _prefix(adapter, spec) if ours.kind == "prefix" else _embedding(adapter, spec, task_id)
    prompt = ours.restore(spec, weights)
    prompt.head = _read_head(adapter)
    prompt.task_type = adapter.task_type
    return prompt


def _content(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError:
        raise other_format(folder, name) from None


def adapter_config(content: bytes, where: str) -> Mapping[str, Any]:
    """The fields of an `adapter_config.json`; `where` names it in errors. Errors: PromptFileError."""
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise PromptFileError(f"{where} is not JSON ({error}): it is truncated or altered") from None
    if not isinstance(config, dict):
        raise PromptFileError(f"{where} holds a {type(config).__name__}, expected an object")
    return config


def _read_config(adapter: _Adapter) -> PromptConfig:
    """Our config for the adapter's method; a reparameterisation is named though PEFT has collapsed it."""
    length, kind = adapter.number("num_virtual_tokens"), adapter.config["peft_type"]
    try:
        if kind == "PREFIX_TUNING":
            mlp = bool(adapter.config.get("prefix_projection"))
            hidden = adapter.number("encoder_hidden_size", 512)
            return PrefixTuning(
                num_virtual_tokens=length, reparameterization="mlp" if mlp else None, hidden_size=hidden
            )
        if kind == "CARTRIDGE":
            return Cartridge(num_virtual_tokens=length, num_frozen_tokens=adapter.number("num_frozen_tokens", 1))
        if kind == "P_TUNING":
            return _read_p_tuning(adapter, length)
        return PromptTuning(num_virtual_tokens=length)
    except ArgumentError as error:
        raise PromptFileError(f"{adapter.where}/{CONFIG}: {error}") from None


def _read_p_tuning(adapter: _Adapter, length: int) -> PTuning:
    # PEFT's LSTM has its hidden size in each direction, ours half of it; PEFT's MLP always has three layers
    lstm = adapter.config.get("encoder_reparameterization_type") == "LSTM"
    hidden = adapter.number("encoder_hidden_size", adapter.number("token_dim"))
    return PTuning(
        num_virtual_tokens=length,
        encoder="lstm" if lstm else "mlp",
        encoder_hidden_size=2 * hidden if lstm else hidden,
        encoder_layers=adapter.number("encoder_num_layers", 2) if lstm else 3,
        encoder_dropout=adapter.config.get("encoder_dropout") or 0.0,
    )


def _embedding(adapter: _Adapter, spec: BackboneSpec, task_id: int | None) -> torch.Tensor:
    """Effective embeddings `[P, E]`: the first P rows, the only ones PEFT gives to a model."""
    length = adapter.number("num_virtual_tokens")
    rows = adapter.tensor("prompt_embeddings")
    expected = [length * adapter.submodules, spec.hidden_size]
    if list(rows.shape) != expected:
        raise IncompatiblePromptError(
            f"{adapter.where}: prompt_embeddings is {list(rows.shape)}, expected {expected} for {spec.describe()}: "
            "load it on the backbone it was trained with"
        )
    if adapter.config["peft_type"] == "MULTITASK_PROMPT_TUNING":
        rows = rows * _task_factor(adapter, rows, task_id)
    return rows[:length]


def _task_factor(adapter: _Adapter, rows: torch.Tensor, task_id: int | None) -> torch.Tensor:
    """What one task multiplies the shared rows by: `cols[task] @ rows[task]`, `[rows, E]`."""
    cols, task_rows = adapter.tensor("prefix_task_cols"), adapter.tensor("prefix_task_rows")
    tasks, ranks = cols.shape[0], cols.shape[-1]
    if list(cols.shape) != [tasks, len(rows), ranks] or list(task_rows.shape) != [tasks, ranks, rows.shape[1]]:
        raise PromptFileError(
            f"{adapter.where}: prefix_task_cols {list(cols.shape)} and prefix_task_rows {list(task_rows.shape)} do not "
            f"fit prompt_embeddings {list(rows.shape)}"
        )
    task = 0 if task_id is None and tasks == 1 else task_id
    if not isinstance(task, int) or not 0 <= task < tasks:
        raise ArgumentError(f"task_id is {task_id!r}, expected 0..{tasks - 1}: {adapter.where} holds {tasks} tasks")
    return cols[task] @ task_rows[task]


def _prefix(adapter: _Adapter, spec: BackboneSpec) -> torch.Tensor:
    """Effective flat prefix `[P, width]` over the layers of `spec`."""
    length, layers = adapter.number("num_virtual_tokens"), adapter.number("num_layers")
    heads, width = adapter.number("num_attention_heads"), adapter.number("token_dim")
    flat = adapter.tensor("prompt_embeddings")
    if not heads or width % heads or list(flat.shape) != [length, layers * 2 * width]:
        raise PromptFileError(
            f"{adapter.where}: prompt_embeddings is {list(flat.shape)}, its config says [{length}, {layers} layers x 2 "
            f"x {width}] in {heads} heads: the files do not belong together"
        )
    enough = layers >= spec.num_layers if spec.encoder_decoder else layers == spec.num_layers
    if not enough or set(spec.layers) != {LayerShape(heads, width // heads, width // heads)}:
        raise IncompatiblePromptError(
            f"{adapter.where} holds a prefix for {layers} layers of {heads} kv heads x "
            f"{width // heads}; this backbone is {spec.describe()}: load it on the backbone it was trained with"
        )
    if not spec.encoder_decoder:
        return flat
    if adapter.submodules != 2:
        raise UnsupportedError(
            f"{adapter.where} is an encoder-decoder prefix with num_transformer_submodules="
            f"{adapter.submodules}, for which PEFT mixes the prefix into cross-attention: only 2 is read"
        )
    return flat.unflatten(1, (layers, -1))[:, [slot_pair(i, layers) for i in range(spec.num_layers)]].flatten(1)


def _read_head(adapter: _Adapter) -> PromptHead | None:
    saved = adapter.saved_modules
    tensors, modules = {}, set()
    for key, tensor in adapter.tensors.items():
        if key in ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows"):
            continue
        name = key.removeprefix("base_model.")
        module = module_of(name, saved)
        if module is None or name == key:
            raise UnsupportedError(
                f"{adapter.where}/{WEIGHTS} holds {key}, which is neither a prompt nor in modules_to_save "
                f"{sorted(set(saved))}: load such weights onto the backbone itself"
            )
        tensors[name] = tensor
        modules.add(module)
    if not tensors:
        return None
    if len(modules) > 1:
        return PromptHead("", tensors)
    module = modules.pop()
    return PromptHead(module, {name.removeprefix(f"{module}."): t for name, t in tensors.items()})
