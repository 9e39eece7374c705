"""`fastprompt info --explain SHAPE`: what a decoding step costs by each path, which one runs, and why."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastprompt.cli.output import console

_OP = "paged_prefix_attention"


def explained(text: str) -> dict[str, Any]:
    """The counted work and predicted time of every path for a shape, and what the ops would choose.

    `chosen`: on a GPU that all paths run on. `here`: on this machine. Raises `ArgumentError` for what is no shape.
    """
    import torch

    from fastprompt import costs, dispatch
    from fastprompt.plan import BatchPlan

    shape = costs.Decode.parse(text)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = BatchPlan.build(*shape.extents(), queries=[1] * shape.rows)
    table = costs.table(device)
    shared = plan.sharing is not None
    problems = _problems(shape, plan)
    paths = {}
    for name, about in costs.PATHS.items():
        work = shape.work(name, shared if name == "cuda" else name == "triton")
        paths[name] = {
            "about": about, "microseconds": table.microseconds(name, work), **asdict(work), "here": problems[name],
        }  # fmt: skip
    triton = "triton" if shared else "single"
    refused, dearer = _limits(shape, plan), costs.cheaper_than_cuda(table, shape, shared)
    best = triton if refused or dearer else "cuda"
    here = next((path for path in (best, triton) if problems[path] is None), None)
    if here is None:
        here = dispatch.choose(_OP, None, device, torch.bfloat16)
    tiles = plan.tiles
    return {
        "shape": asdict(shape),
        "table": {"device": table.device, "measured": table.measured, "source": table.source},
        "tiles": 0 if tiles is None else int((tiles[:, 0] >= 0).sum()),
        "paths": paths,
        "chosen": best,
        "why": refused or dearer or f"it takes this, and {triton} is not predicted to cost less",
        "here": here,
    }


def _limits(shape: Any, plan: Any) -> str | None:
    """Why the CUDA kernel does not take a shape, whatever the machine."""
    import torch

    from fastprompt._cuda import limits
    from fastprompt.arguments import PagedPrefixAttention

    if shape.itemsize != 2:
        return f"it got numbers of {shape.itemsize} bytes, expected 2"
    q = torch.empty(shape.rows, shape.heads, shape.dim, dtype=torch.bfloat16, device="meta")
    cache, arena = q.new_empty(1, 16, shape.kv_heads, shape.dim), q.new_empty(shape.kv_heads, 1, shape.dim)
    rows = q.new_empty(shape.rows, dtype=torch.int32)
    call = PagedPrefixAttention(
        q, cache, cache, rows[:, None], rows, rows, arena, arena, rows, rows, None, 1.0, None, None
    )
    return limits.problem(call, plan)


def _problems(shape: Any, plan: Any) -> dict[str, str | None]:
    """Why each path does not run here, or None."""
    from fastprompt import dispatch

    triton = dispatch.obstacle(_OP, "triton")
    cuda = dispatch.obstacle(_OP, "cuda") or _limits(shape, plan)
    alone = None if plan.sharing is not None else "by the table's rules nobody shares"
    return {"cuda": cuda, "triton": triton or alone, "single": triton}


def render(data: dict[str, Any]) -> None:
    """Prints it."""
    table, tiles = data["table"], data["tiles"]
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("path", "launches", "MB once", "MB again", "MB states", "predicted us"):
        shown.add_column(column, justify="left" if column == "path" else "right")
    for name, path in data["paths"].items():
        sizes = [f"{path[kind] / 1e6:.1f}" for kind in ("unique", "again", "states")]
        shown.add_row(name, f"{path['launches']:g}", *sizes, f"{path['microseconds']:.1f}")
    above = [
        "{rows} rows of {prompts} prompts, {prefix} virtual tokens each, {own} own keys a row, "
        "{heads}/{kv_heads} heads of {dim}".format(**data["shape"]),
        f"plan: {tiles} tiles of up to 16 rows read their prompt together" if tiles else "plan: nobody shares",
    ]
    below = [
        f"chosen on a GPU: {data['chosen']} ({data['why']}); here: {data['here']}",
        *(f"{name} does not run here: {path['here']}" for name, path in data["paths"].items() if path["here"]),
        f"cost table for {table['device'] or 'any device'}, "
        f"{'measured' if table['measured'] else 'not measured'}: {table['source']}",
    ]
    for part in (*above, shown, *below):
        console.print(part, soft_wrap=isinstance(part, str), markup=False)
