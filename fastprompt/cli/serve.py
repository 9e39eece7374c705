"""`fastprompt serve`: every prompt of a folder over one backbone, behind OpenAI's HTTP interface."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fastprompt import env
from fastprompt.cli.backbones import Backbone
from fastprompt.cli.sizes import parse_bytes
from fastprompt.errors import ArgumentError


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
    storage: Annotated[
        str | None, typer.Option(help="Prompts in host memory: model (as computed with), or 8 bits: int8, fp8.")
    ] = None,
    drain_seconds: Annotated[
        float | None, typer.Option(min=0, show_default="30", help="How long requests may end after SIGTERM.")
    ] = None,
    engine: Annotated[str, typer.Option(help="embedded, or vllm to run vLLM's server; see docs/vllm.md.")] = "embedded",
    store: Annotated[Path | None, typer.Option(help="vLLM's store of prompts; .vllm in PROMPTS.")] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="[-- VLLM OPTIONS]", help="For vLLM's server.")] = None,
) -> None:
    """Serve the prompts of a folder over one backbone: OpenAI's endpoints, administration and metrics."""
    if engine not in ("embedded", "vllm"):
        raise ArgumentError(f"--engine is {engine!r}, expected 'embedded' or 'vllm'")
    _need_packages()
    from fastprompt.serving.http import Access, Options, create_app
    from fastprompt.serving.http.server import binding, check_free, run
    from fastprompt.serving.launch import EngineConfig, make_engine

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    sizes = {"max_rows": max_rows, "max_batch_tokens": max_batch_tokens, "max_model_len": max_model_len}
    sizes["kv_bytes"] = parse_bytes("--kv-bytes", kv_bytes)
    if engine == "vllm":
        apart = {"device": device, "max-queued": max_queued, "bank-bytes": bank_bytes, "host-bytes": host_bytes}
        _refuse(engine, **apart, storage=storage, **{"drain-seconds": drain_seconds})
    else:
        _refuse(engine, store=store, **{"-": more})
    access = Access(keys, env.api_keys(), env.admin_keys())
    place = binding(host, port, access, insecure)
    check_free(place)
    if engine == "vllm":
        common = {"host": host, "port": port, "keys": keys, "insecure": insecure, "open_metrics": open_metrics}
        _run_vllm(backbone, prompts, store, dtype, name=name, more=more or [], **common, **sizes)
    config = EngineConfig(
        backbone,
        str(prompts),
        name=name,
        device=device,
        dtype=dtype,
        max_queued=max_queued,
        device_bytes=parse_bytes("--bank-bytes", bank_bytes),
        host_bytes=parse_bytes("--host-bytes", host_bytes),
        storage=storage,
        **sizes,
    )
    app = create_app(make_engine(config), access, Options(hosts=place.hosts, open_metrics=open_metrics))
    run(app, place, 30.0 if drain_seconds is None else drain_seconds)


def _run_vllm(
    backbone: str, prompts: Path, folder: Path | None, dtype: str | None, name: str | None, **options: Any
) -> NoReturn:
    """Bring the store up to date with the prompts, and become vLLM's server."""
    from fastprompt.cli.export_vllm import export_to_vllm
    from fastprompt.integrations.vllm import PrefixStore
    from fastprompt.integrations.vllm.launch import VllmServer
    from fastprompt.integrations.vllm.versions import check_installed

    check_installed()
    folder = folder or prompts / ".vllm"
    for problem in export_to_vllm(prompts, folder, backbone, dtype)["refused"].values():
        logging.getLogger("fastprompt.vllm").warning("not served: %s", problem)
    held = PrefixStore(folder).backbone()
    served = name or Path(backbone).resolve().name
    VllmServer(held.model, served, folder, prompts, dtype=held.dtype, **options).run()


def _refuse(engine: str, **options: object) -> None:
    """Raise ArgumentError for options that are given and mean nothing to an engine."""
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise ArgumentError(f"{', '.join(given)}: no option of --engine {engine}; see fastprompt serve --help")


def _need_packages() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ArgumentError(f"the server needs {error.name}: pip install 'fastprompt[serve]'") from None
