"""What the two files of a stored prompt hold: `prompt.safetensors` and `prompt.json`, from and to bytes."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch

from fastprompt.errors import ArgumentError, IncompatiblePromptError, PromptFileError, UnsupportedError
from fastprompt.prompts import PromptConfig, PromptHead, SoftPrompt, config_from_dict
from fastprompt.spec import BackboneSpec, Prefix, flatten, unflatten

FORMAT_VERSION = 1
WEIGHTS, METADATA = "prompt.safetensors", "prompt.json"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FIELDS: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "method": (str,),
    "config": (dict,),
    "length": (int,),
    "layers": (list,),
    "backbone": (dict,),
    "fingerprint": (str,),
    "sha256": (str,),
    "head_module": (str, type(None)),
    "labels": (list, type(None)),
    "task_type": (str, type(None)),
    "record": (dict, type(None)),
}


def prompt_files(prompt: SoftPrompt, record: dict[str, Any] | None = None) -> dict[str, bytes]:
    """The files of a stored prompt, name -> content; equal prompts give equal bytes.

    Semantics: the effective weights (a reparameterisation is collapsed), float32, with the head, the labels and
    `record` (a JSON object about the training; None keeps the prompt's own). ArgumentError for weights that are not
    finite or a record that is not JSON.
    """
    tensors = prompt_tensors(prompt)
    check_finite(tensors, ArgumentError, "prompt")
    weights = safetensors_torch.save(tensors)
    try:
        text = json.dumps(_metadata(prompt, weights, record), sort_keys=True, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"record cannot be written as JSON ({error}): use JSON types and finite numbers") from None
    return {WEIGHTS: weights, METADATA: text.encode() + b"\n"}


def parse_metadata(raw: bytes, where: str) -> dict[str, Any]:
    """What a `prompt.json` says, checked; `where` names it in errors."""
    try:
        metadata = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise PromptFileError(f"{where} is not JSON ({error}): it is truncated or altered") from None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("format_version"), int):
        raise PromptFileError(f"{where} is not a prompt's metadata: it has no format_version")
    if metadata["format_version"] != FORMAT_VERSION:
        raise PromptFileError(
            f"{where} has format version {metadata['format_version']}, this fastprompt reads {FORMAT_VERSION}: "
            "upgrade fastprompt"
        )
    for name, types in FIELDS.items():
        if name not in metadata or not isinstance(metadata[name], types):
            names = " or ".join(t.__name__ for t in types)
            raise PromptFileError(f"{where}: field {name} is {_short(metadata.get(name))}, expected {names}")
    if not all(isinstance(label, str) for label in metadata["labels"] or ()):
        raise PromptFileError(f"{where}: field labels is {_short(metadata['labels'])}, expected names")
    for text in (*(metadata["labels"] or ()), metadata["task_type"] or ""):  # which others are shown
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise PromptFileError(f"{where}: {_short(text)} has half a character, expected Unicode text")
    return metadata


def parse_prompt(
    metadata: Mapping[str, Any], weights: bytes, spec: BackboneSpec | None = None, *, where: str
) -> SoftPrompt:
    """The prompt of a checked `prompt.json` and of a `prompt.safetensors` that its digest fits.

    Trainable, collapsed, float32, on the CPU. `spec` is the backbone it must fit, None the one it names; `where` names
    its folder in errors. Errors: PromptFileError for an altered, non-finite or unreadable prompt;
    IncompatiblePromptError for one made for another backbone.
    """
    made_for = _backbone(metadata, where)
    config = _config(metadata, made_for, where)
    if spec is not None:
        here = config.needs(spec)
        if here.fingerprint() != made_for.fingerprint():
            raise IncompatiblePromptError(
                f"prompt {where} was made for {made_for.describe()}, fingerprint {made_for.fingerprint()}; "
                f"this backbone is {here.describe()}, fingerprint {here.fingerprint()}: load it on the backbone it was "
                "trained with"
            )
        made_for = spec
    tensors = read_tensors(weights, f"{where}/{WEIGHTS}")
    head = {k.removeprefix("head."): tensors.pop(k) for k in sorted(tensors) if k.startswith("head.")}
    _check_shapes(tensors, config, made_for, where)
    prompt = config.restore(made_for, _flat(tensors, config, made_for))
    if head or metadata["head_module"] is not None:
        try:
            prompt.head = PromptHead(metadata["head_module"] or "", head)
        except ArgumentError as error:
            raise PromptFileError(f"{where}/{WEIGHTS}: {error}") from None
    prompt.labels = None if metadata["labels"] is None else tuple(metadata["labels"])
    prompt.task_type, prompt.record = metadata["task_type"], metadata["record"]
    return prompt


def prompt_tensors(prompt: SoftPrompt) -> dict[str, torch.Tensor]:
    """The effective tensors by their stored names, float32, on the CPU.

    "embedding" `[P, E]`, or "layers.{i}.key" `[Hkv, P, D]` and "layers.{i}.value" `[Hkv, P, Dv]`, for an
    encoder-decoder also "encoder.{i}..." and "cross.{i}..."; "head.{name}".
    """
    weights = prompt.weights()
    tensors = {"embedding": weights}
    if prompt.kind == "prefix":
        prefix = unflatten(weights, prompt.spec, prompt.config.prefix_layers(prompt.spec))
        named = zip(map(prompt.spec.site_name, prefix.layers), prefix.keys, prefix.values, strict=True)
        tensors = {f"{site}.{kind}": t for site, k, v in named for kind, t in (("key", k), ("value", v))}
    if prompt.head is not None:
        tensors |= {f"head.{name}": p.detach() for name, p in prompt.head.tensors().items()}
    return {name: t.to("cpu", torch.float32).contiguous() for name, t in tensors.items()}


def prompt_digest(prompt: SoftPrompt) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of `prompt_tensors`: equal exactly when the contents are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(prompt_tensors(prompt).items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def read_tensors(content: bytes, where: str) -> dict[str, torch.Tensor]:
    """Finite floating-point tensors of a safetensors file's `content`; `where` names it in errors."""
    try:
        tensors = safetensors_torch.load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise PromptFileError(
            f"{where} is not a whole safetensors file ({error}): it is truncated, altered or of another format, "
            "and only safetensors is read; save it again"
        ) from None
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise PromptFileError(
                f"{where}: {name} has dtype {tensor.dtype}, expected a floating-point type, one of {names}"
            )
    check_finite({name: tensor.float() for name, tensor in tensors.items()}, PromptFileError, where)
    return tensors


def check_finite(tensors: Mapping[str, torch.Tensor], error: type[Exception], where: str) -> None:
    """Raise `error` if a tensor holds NaN or infinity; `where` names their owner."""
    for name, tensor in tensors.items():
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise error(f"{where}: {name} has {bad} values that are NaN or infinite, expected finite weights")


def _metadata(prompt: SoftPrompt, weights: bytes, record: dict[str, Any] | None) -> dict[str, Any]:
    backbone = prompt.config.needs(prompt.spec)
    return {
        "format_version": FORMAT_VERSION,
        "method": prompt.config.method,
        "config": prompt.config.to_dict(),
        "length": prompt.length,
        "layers": _layers(prompt.config, backbone),
        "backbone": backbone.to_dict(),
        "fingerprint": backbone.fingerprint(),
        "sha256": sha256(weights),
        "head_module": None if prompt.head is None else prompt.head.module,
        "labels": None if prompt.labels is None else list(prompt.labels),
        "task_type": prompt.task_type,
        "record": prompt.record if record is None else record,
    }


def _layers(config: PromptConfig, spec: BackboneSpec) -> list[int]:
    """The layers of the decoder, or of the only stack, that a prefix enters; its config tells other parts."""
    return [i for i in config.prefix_layers(spec) if i < spec.num_layers]


def sha256(content: bytes) -> str:
    """SHA-256 of a file's content, in hex."""
    return hashlib.sha256(content).hexdigest()


def _backbone(metadata: Mapping[str, Any], where: str) -> BackboneSpec:
    try:
        spec = BackboneSpec.from_dict(metadata["backbone"])
    except (TypeError, KeyError) as error:
        raise PromptFileError(f"{where}/{METADATA}: field backbone is malformed ({error})") from None
    counts = [spec.hidden_size, spec.vocab_size, *(n for s in spec.sites for n in (s.kv_heads, s.key_dim, s.value_dim))]
    if not isinstance(spec.model_type, str) or not all(isinstance(n, int) for n in counts):
        raise PromptFileError(f"{where}/{METADATA}: field backbone is {_short(metadata['backbone'])}: it was altered")
    if spec.fingerprint() != metadata["fingerprint"]:
        raise PromptFileError(
            f"{where}/{METADATA}: fingerprint is {_short(metadata['fingerprint'])}, but its backbone "
            f"{spec.describe()} has {spec.fingerprint()}: the file was altered"
        )
    return spec


def _config(metadata: Mapping[str, Any], spec: BackboneSpec, where: str) -> PromptConfig:
    try:
        config = config_from_dict(metadata["method"], metadata["config"])
        layers = _layers(config, spec)
    except (ArgumentError, UnsupportedError, TypeError) as error:
        raise PromptFileError(f"{where}/{METADATA}: {error}") from None
    if (metadata["length"], metadata["layers"]) != (config.num_virtual_tokens, layers):
        raise PromptFileError(
            f"{where}/{METADATA}: length {metadata['length']} and layers {_short(metadata['layers'])} disagree with "
            f"its config, which says {config.num_virtual_tokens} and {layers}"
        )
    return config


def _check_shapes(tensors: Mapping[str, torch.Tensor], config: PromptConfig, spec: BackboneSpec, where: str) -> None:
    length = config.num_virtual_tokens
    expected = {"embedding": [length, spec.hidden_size]}
    if config.kind == "prefix":
        shapes = {spec.site_name(i): spec.sites[i] for i in config.prefix_layers(spec)}
        expected = {f"{site}.key": [s.kv_heads, length, s.key_dim] for site, s in shapes.items()}
        expected |= {f"{site}.value": [s.kv_heads, length, s.value_dim] for site, s in shapes.items()}
    for name in sorted({*expected, *tensors}):
        came = list(tensors[name].shape) if name in tensors else "missing"
        wanted = expected.get(name, "no such tensor")
        if came != wanted:
            raise PromptFileError(f"{where}/{WEIGHTS}: {name} is {came}, expected {wanted}")


def _flat(tensors: Mapping[str, torch.Tensor], config: PromptConfig, spec: BackboneSpec) -> torch.Tensor:
    if config.kind == "embedding":
        return tensors["embedding"]
    layers = config.prefix_layers(spec)
    keys = tuple(tensors[f"{spec.site_name(i)}.key"] for i in layers)
    values = tuple(tensors[f"{spec.site_name(i)}.value"] for i in layers)
    return flatten(Prefix(layers, keys, values))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _short(value: object) -> str:
    return reprlib.repr(value)  # what a file says may be as long as the file
