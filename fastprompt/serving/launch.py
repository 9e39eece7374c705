"""An engine from what a user says of it: which backbone, which prompts, how much memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprompt.demo import EMBEDDED
from fastprompt.errors import ArgumentError

if TYPE_CHECKING:
    from fastprompt.serving.http.face import Engine

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineConfig:
    """A backbone (a folder, an id on the hub, or "embedded"), the folder of its prompts, and how it runs.

    Fields are named as the options of `fastprompt serve` and mean the same; `device_bytes` is its `--bank-bytes`. None
    leaves a field to the engine. Plain values only: it may be sent to another process.
    """

    backbone: str
    prompts: str
    name: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_rows: int | None = None
    max_batch_tokens: int | None = None
    max_model_len: int | None = None
    max_queued: int | None = None
    kv_bytes: int | None = None
    device_bytes: int | None = None
    host_bytes: int | None = None
    storage: str | None = None

    @property
    def served_name(self) -> str:
        """What clients call the bare backbone: the last part of its path unless `name` says otherwise."""
        return self.name or (EMBEDDED if self.backbone == EMBEDDED else Path(self.backbone).resolve().name)


def make_engine(config: EngineConfig) -> Engine:
    """An engine for what the backbone does: one that continues texts, or one that labels and embeds them.

    Errors: ArgumentError for a dtype, a device or a backbone that is not there.
    """
    from fastprompt.cli.backbones import load_tokenizer
    from fastprompt.serving.host_copy import STORAGES

    if config.storage not in (None, *STORAGES):
        raise ArgumentError(f"storage (--storage) is {config.storage!r}, expected {', '.join(STORAGES)}")
    load = _loader(config)
    tokenizer = load_tokenizer(config.backbone)
    if not generates(config.backbone):
        return _encoder(config, load, tokenizer)
    from fastprompt.serving.async_engine import AsyncEngine
    from fastprompt.serving.build import EngineOptions, build_engine
    from fastprompt.serving.scheduler import Rules

    rules = Rules(**_given(config, "max_rows", "max_batch_tokens"))
    sizes = _given(config, "max_model_len", "kv_bytes", "device_bytes", "host_bytes", "storage")
    options = EngineOptions(rules=rules, **sizes)
    return AsyncEngine(
        lambda: build_engine(load(), config.prompts, options),
        tokenizer,
        config.served_name,
        **_given(config, "max_queued"),
    )


def generates(path: str) -> bool:
    """Whether the backbone's class continues texts, from its config alone."""
    import transformers

    if path == EMBEDDED:
        return True
    named = (transformers.AutoConfig.from_pretrained(path).architectures or ["AutoModel"])[0]
    found = getattr(transformers, named, None)
    return bool(found is not None and hasattr(found, "can_generate") and found.can_generate())


def _encoder(config: EngineConfig, load: Callable[[], Any], tokenizer: Any) -> Any:
    from fastprompt import PromptedModel
    from fastprompt.serving.batcher import BatchLimits
    from fastprompt.serving.encoder_options import EncoderOptions
    from fastprompt.serving.encoders import EncoderEngine
    from fastprompt.serving.registry import PromptRegistry

    if config.kv_bytes is not None:
        raise ArgumentError(
            "kv_bytes (--kv-bytes) is for backbones that continue texts, and this one does not: omit it"
        )
    prompted = PromptedModel(load(), tokenizer)
    limits = BatchLimits(**_given(config, "max_rows", max_batch_tokens="max_tokens"))
    renamed = {"max_model_len": "max_length", "device_bytes": "max_prompt_bytes"}
    options = _given(config, "max_queued", "host_bytes", "storage", **renamed)
    return EncoderEngine(
        prompted,
        tokenizer,
        PromptRegistry(config.prompts, prompted._info.spec),
        name=config.served_name,
        options=EncoderOptions(batch=limits, **options),
    )


def _loader(config: EngineConfig) -> Callable[[], Any]:
    """What loads the backbone, called in the thread that will run it; dtype and device are checked at once."""
    from fastprompt.cli.backbones import load_backbone

    if config.dtype not in (None, *DTYPES):
        raise ArgumentError(f"dtype (--dtype) is {config.dtype!r}, expected {', '.join(DTYPES)}")
    device = _device(config.device)

    def load() -> Any:
        import torch

        dtype = None if config.dtype is None else getattr(torch, config.dtype)
        loaded = load_backbone(config.backbone, **({} if dtype is None else {"dtype": dtype}))
        return loaded.to(device=device, dtype=dtype or loaded.dtype)

    return load


def _device(device: str | None) -> str:
    import torch

    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"device (--device) is {wanted!r}, which torch cannot use here: {error}") from None
    return wanted


def _given(config: EngineConfig, *names: str, **renamed: str) -> dict[str, Any]:
    """Fields of the config that are set, under their own names or others."""
    wanted = dict(zip(names, names, strict=True)) | renamed
    return {to: value for name, to in wanted.items() if (value := getattr(config, name)) is not None}
