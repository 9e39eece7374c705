"""`fastprompt serve`: every prompt of a folder over one backbone, behind OpenAI's HTTP interface."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastprompt import env
from fastprompt.cli.backbones import EMBEDDED, Backbone, load_backbone, load_tokenizer
from fastprompt.cli.sizes import parse_bytes
from fastprompt.errors import ArgumentError

if TYPE_CHECKING:
    from fastprompt.serving.http.face import Engine

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class _Model:
    """The backbone as it is to be loaded, and what it may take; None leaves the engine's own defaults."""

    path: str
    name: str
    prompts: Path
    device: str
    dtype: str | None
    rules: dict[str, int | None]
    sizes: dict[str, Any]
    max_queued: int | None


def serve(
    backbone: Backbone,
    prompts: Annotated[Path, typer.Option(help="The folder of prompts, each in a folder of its name.")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the bare backbone; its path's last part.")] = None,
    keys: Annotated[Path | None, typer.Option(help="A TOML or JSON file of API keys; see docs/serving.md.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without any keys.")] = False,
    open_metrics: Annotated[bool, typer.Option("--open-metrics", help="Show /metrics without a key.")] = False,
    device: Annotated[str | None, typer.Option(help="Where the backbone runs; a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as the backbone is stored.")] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Rows that run at once.")] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of one step.")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Tokens of a row, virtual ones too.")] = None,
    max_queued: Annotated[int | None, typer.Option(min=1, help="Requests under way before others get 429.")] = None,
    kv_bytes: Annotated[str | None, typer.Option(metavar="BYTES", help="For rows' own keys and values.")] = None,
    bank_bytes: Annotated[str | None, typer.Option(metavar="BYTES", help="For prompts on the device.")] = None,
    host_bytes: Annotated[str | None, typer.Option(metavar="BYTES", help="For prompts in host memory.")] = None,
    drain_seconds: Annotated[float, typer.Option(min=0, help="How long requests may end after SIGTERM.")] = 30.0,
) -> None:
    """Serve the prompts of a folder over one backbone: OpenAI's endpoints, administration and metrics."""
    _need_packages()
    from fastprompt.serving.http import Access, Options, create_app
    from fastprompt.serving.http.server import binding, run

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    access = Access(keys, env.api_keys(), env.admin_keys())
    place = binding(host, port, access, insecure)
    model = _Model(
        backbone,
        name or (EMBEDDED if backbone == EMBEDDED else Path(backbone).resolve().name),
        prompts,
        _device(device),
        _check_dtype(dtype),
        {"max_rows": max_rows, "max_batch_tokens": max_batch_tokens},
        {
            "max_model_len": max_model_len,
            "kv_bytes": parse_bytes("--kv-bytes", kv_bytes),
            "device_bytes": parse_bytes("--bank-bytes", bank_bytes),
            "host_bytes": parse_bytes("--host-bytes", host_bytes),
        },
        max_queued,
    )
    app = create_app(_engine(model), access, Options(hosts=place.hosts, open_metrics=open_metrics))
    run(app, place, drain_seconds)


def _check_dtype(dtype: str | None) -> str | None:
    if dtype not in (None, *DTYPES):
        raise ArgumentError(f"--dtype is {dtype!r}, expected {', '.join(DTYPES)}")
    return dtype


def _need_packages() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ArgumentError(f"the server needs {error.name}: pip install 'fastprompt[serve]'") from None


def _engine(model: _Model) -> Engine:
    """An engine for what the backbone does: one that continues texts, or one that labels and embeds them."""
    tokenizer = load_tokenizer(model.path)
    if not _generates(model.path):
        return _encoder(model, tokenizer)
    from fastprompt.serving.async_engine import AsyncEngine
    from fastprompt.serving.build import EngineOptions, build_engine
    from fastprompt.serving.scheduler import Rules

    options = EngineOptions(rules=Rules(**_given(model.rules)), **_given(model.sizes))
    load = _loader(model)
    return AsyncEngine(
        lambda: build_engine(load(), model.prompts, options),
        tokenizer,
        model.name,
        **_given({"max_queued": model.max_queued}),
    )


def _encoder(model: _Model, tokenizer: Any) -> Any:
    from fastprompt import PromptedModel
    from fastprompt.serving.batcher import BatchLimits
    from fastprompt.serving.encoder_options import EncoderOptions
    from fastprompt.serving.encoders import EncoderEngine
    from fastprompt.serving.registry import PromptRegistry

    prompted = PromptedModel(_loader(model)(), tokenizer)
    limits = _given({"max_tokens": model.rules["max_batch_tokens"], "max_rows": model.rules["max_rows"]})
    options = {
        "max_length": model.sizes["max_model_len"],
        "max_prompt_bytes": model.sizes["device_bytes"],
        "max_queued": model.max_queued,
    }
    return EncoderEngine(
        prompted,
        tokenizer,
        PromptRegistry(model.prompts, prompted._info.spec),
        name=model.name,
        options=EncoderOptions(batch=BatchLimits(**limits), **_given(options)),
    )


def _loader(model: _Model) -> Callable[[], Any]:
    """What loads the backbone, called in the thread that will run it."""

    def load() -> Any:
        import torch

        dtype = None if model.dtype is None else getattr(torch, model.dtype)
        loaded = load_backbone(model.path, **_given({"dtype": dtype}))
        return loaded.to(device=model.device, dtype=dtype or loaded.dtype)

    return load


def _generates(path: str) -> bool:
    """Whether the backbone's class continues texts, from its config alone."""
    import transformers

    if path == EMBEDDED:
        return True
    named = (transformers.AutoConfig.from_pretrained(path).architectures or ["AutoModel"])[0]
    found = getattr(transformers, named, None)
    return bool(found is not None and hasattr(found, "can_generate") and found.can_generate())


def _device(device: str | None) -> str:
    import torch

    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device is {wanted!r}, which torch cannot use here: {error}") from None
    return wanted


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
