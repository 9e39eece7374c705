"""`fastprompt plan-capacity`: how many prompts fit beside a backbone, and what loading the others costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastprompt.cli.output import Json, console, emit, fields
from fastprompt.cli.sizes import parse_bytes
from fastprompt.errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from fastprompt.capacity import Sizes, Traffic
    from fastprompt.spec import BackboneSpec

_ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
_LEGEND = """P: virtual tokens. prefix: prefix tuning, P-tuning v2, cartridge; embedding: prompt tuning, P-tuning.
size: in the device's memory; fit: how many do; hits: requests that find theirs there (LRU, Che's approximation).
loads: onto the device; reads: those of them that come from disk, not from host memory."""
_POSITIONS = 4096  # tokens of a row where nobody says, as the engine has it
_OWN_BYTES = 2**31  # for rows' own keys and values where nobody says, as the engine has it


@dataclass(frozen=True)
class _Backbone:
    """What a config tells without weights."""

    spec: BackboneSpec
    parameters: int
    dtype: str
    positions: int


def plan_capacity(
    backbone: Annotated[
        str, typer.Argument(help="A transformers config: its file, its folder, an id on the hub, or 'embedded'.")
    ],
    virtual_tokens: Annotated[str, typer.Option(help="Lengths of prompts, divided by commas.")] = "20,100",
    memory: Annotated[str, typer.Option(metavar="BYTES", help="All of the device's memory.")] = "80GiB",
    host_bytes: Annotated[str, typer.Option(metavar="BYTES", help="For prompts in host memory.")] = "1GiB",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the config's.")] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="BYTES", help="The weights, where they are quantized; as dtype says.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows that run at once.")] = 64,
    row_tokens: Annotated[
        int | None, typer.Option(min=1, help="Own tokens of a row; the positions, at most 4096.")
    ] = None,
    kv_bytes: Annotated[
        str | None, typer.Option(metavar="BYTES", help="For rows' own keys and values; room for all, at most 2GiB.")
    ] = None,
    reserve: Annotated[float, typer.Option(min=0, max=0.99, help="Share kept free for activations.")] = 0.1,
    prompts: Annotated[int, typer.Option(min=1, max=10_000_000, help="Prompts that are asked for.")] = 10_000,
    zipf: Annotated[float, typer.Option(min=0, help="Exponent of their popularity; 0: all alike.")] = 1.0,
    rate: Annotated[float, typer.Option(min=0, help="Requests a second.")] = 100.0,
    as_json: Json = False,
) -> None:
    """Bytes of a prompt, how many fit beside a backbone, and how often the others are loaded; from its config alone."""
    from fastprompt.capacity import Sizes, Traffic, token_bytes

    found = _inspect(backbone, dtype)
    size = _ITEMSIZES[found.dtype]
    token = token_bytes(found.spec, size)
    tokens = row_tokens or min(found.positions, _POSITIONS)
    own = parse_bytes("--kv-bytes", kv_bytes) or (min(rows * tokens * token, _OWN_BYTES) if found.spec.causal else 0)
    sizes = Sizes(
        parse_bytes("--memory", memory) or 0,
        parse_bytes("--weights", weights) or found.parameters * size,
        own,
        reserve,
    )
    traffic = Traffic(prompts, zipf, rate)
    data = {
        "backbone": found.spec.describe(),
        "dtype": found.dtype,
        "sizes": asdict(sizes) | {"prompts": sizes.left, "token": token},
        "traffic": asdict(traffic) | {"rows": rows, "distinct": traffic.distinct(rows)},
        "plans": _plans(
            found.spec, _lengths(virtual_tokens), size, sizes, parse_bytes("--host-bytes", host_bytes) or 0, traffic
        ),
    }
    emit(data, as_json, _render)


def _lengths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) < 2**31 for part in parts):
        raise ArgumentError(f"--virtual-tokens is {text!r}, expected numbers of at least 1 such as 20,100")
    return [int(part) for part in parts]


def _plans(
    spec: BackboneSpec, lengths: list[int], itemsize: int, sizes: Sizes, host_bytes: int, traffic: Traffic
) -> list[dict[str, Any]]:
    """A line for every length and kind of prompt that the backbone takes."""
    from fastprompt.capacity import KINDS, footprint, hits

    plans = []
    for length in lengths:
        for kind in KINDS if spec.layers else ("embedding",):
            one = footprint(spec, kind, length, itemsize)
            fit, host = sizes.left // one.device, host_bytes // one.host
            share = hits(traffic, fit, host)
            loads = traffic.rate * (1 - share.device)
            reads = traffic.rate * share.disk
            plans.append(
                asdict(one)
                | {"fit": fit, "hits": asdict(share)}
                | {"loads": loads, "loaded_bytes": loads * one.device, "reads": reads, "read_bytes": reads * one.file}
            )
    return plans


def _inspect(path: str, dtype: str | None) -> _Backbone:
    """The backbone as its config describes it, on the meta device: nothing is loaded."""
    import torch
    import transformers

    from fastprompt.integrations.transformers.probe import inspect_backbone

    config = _config(path)
    named = (config.architectures or ["AutoModel"])[0]
    cls = getattr(transformers, named, None)
    if cls is None:
        raise ArgumentError(f"BACKBONE is {path!r}, whose config names {named}, which this transformers does not have")
    stored = str(config.dtype or torch.float32).removeprefix("torch.")
    wanted = dtype or stored
    if wanted not in _ITEMSIZES:
        raise ArgumentError(f"--dtype is {wanted!r}, expected {', '.join(_ITEMSIZES)}")
    with torch.device("meta"):
        make = cls._from_config if hasattr(cls, "_from_config") else cls.from_config
        model = make(config, experts_implementation="batched_mm")  # the others look at numbers
    count = sum(parameter.numel() for parameter in model.parameters())
    spec = inspect_backbone(model.eval()).spec
    if spec.encoder_decoder:
        raise UnsupportedError(f"{spec.describe()} is an encoder-decoder, which the engines do not serve")
    text = config.get_text_config(decoder=True)
    return _Backbone(spec, count, wanted, getattr(text, "max_position_embeddings", None) or _POSITIONS)


def _config(path: str) -> Any:
    import transformers

    from fastprompt import demo

    if path == demo.EMBEDDED:
        return demo.backbone().config
    try:
        return transformers.AutoConfig.from_pretrained(Path(path).parent if path.endswith(".json") else path)
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(
            f"BACKBONE is {path!r}, which transformers cannot read: {error}: expected a config.json, its folder, an id "
            f"on the hub, or {demo.EMBEDDED!r}"
        ) from error


def _render(data: dict[str, Any]) -> None:
    sizes, traffic = data["sizes"], data["traffic"]
    fields(
        {
            "backbone": data["backbone"],
            "dtype": data["dtype"],
            "memory": _bytes(sizes["memory"]),
            "weights": _bytes(sizes["weights"]),
            "own tokens": f"{_bytes(sizes['own'])}, {_bytes(sizes['token'])} each",
            "kept free": f"{sizes['reserve']:.0%}",
            "for prompts": _bytes(sizes["prompts"]),
            "traffic": f"{traffic['rate']:g} requests/s, {traffic['prompts']:,} prompts, zipf {traffic['exponent']:g}",
            "at once": f"{traffic['rows']} rows of {traffic['distinct']:.1f} prompts",
        }
    )
    console.print()
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0, collapse_padding=True)
    for column in ("P", "kind", "size", "file", "fit", "hits", "loads/s", "bytes/s", "reads/s", "bytes/s"):
        table.add_column(column, justify="left" if column == "kind" else "right", no_wrap=True)
    for plan in data["plans"]:
        table.add_row(
            f"{plan['length']}",
            plan["kind"],
            _bytes(plan["device"]),
            _bytes(plan["file"]),
            f"{plan['fit']:,}",
            f"{plan['hits']['device']:.1%}",
            f"{plan['loads']:.1f}",
            _bytes(plan["loaded_bytes"]),
            f"{plan['reads']:.1f}",
            _bytes(plan["read_bytes"]),
        )
    console.print(table)
    console.print(_LEGEND, style="dim")


def _bytes(count: float) -> str:
    """Three digits and a unit, as the options take them."""
    for unit in ("", "K", "M", "G"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1024
    return f"{count:.3g}T"
