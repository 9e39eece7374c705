"""The scheduler without a backbone: rows whose tokens are given, over pools of small blocks."""

from __future__ import annotations

from fastprompt.serving.blocks import BlockPool
from fastprompt.serving.request import Generation, SamplingParams
from fastprompt.serving.row import Row
from fastprompt.serving.sampling import Sampler
from fastprompt.serving.scheduler import Admission, Piece, Rules, Scheduler


def make_row(prompt, text=4, new=1000, ids=None) -> Row:
    """A row of `text` tokens that may get `new` ones."""
    params = SamplingParams(max_tokens=new, temperature=0.0)
    ids = list(range(text)) if ids is None else ids
    return Row(Generation(ids, prompt, params), 0, Sampler(params, 0, len(ids), ()), ())


def make_scheduler(blocks=10_000, admit=lambda row: Admission.READY, size=4, **rules) -> Scheduler:
    """A scheduler over `blocks` blocks of `size` tokens."""
    return Scheduler(BlockPool(blocks, size), Rules(**rules), admit, lambda row: repr(row.prompt).encode())


def run_step(scheduler: Scheduler, ends=None) -> list[Piece]:
    """One step in which every complete row gets a token, up to `ends[row]` of them or its most; the pieces."""
    pieces = scheduler.schedule()
    scheduler.ran(pieces)
    for piece in pieces:
        if piece.complete:
            piece.row.tokens.append(7)
            if piece.row.generated >= (ends or {}).get(piece.row, piece.row.generation.params.max_tokens):
                scheduler.remove(piece.row)
    return pieces


def run_all(scheduler: Scheduler, limit=10_000, ends=None) -> tuple[int, int]:
    """Steps until nothing is left, and the tokens that were computed in them."""
    computed = 0
    for steps in range(limit):
        if not scheduler.waiting and not scheduler.running:
            return steps, computed
        computed += sum(piece.count for piece in run_step(scheduler, ends))
    raise AssertionError("rows are left")
