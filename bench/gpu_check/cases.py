"""The shapes that are timed, with their targets, and real sizes whose numbers are checked beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch

from bench.attention_cases import Case
from bench.gpu_check.setting import OURS, Setting

PAGED = f"{OURS}, paged"  # by whatever the op chooses
CUDA = f"{PAGED}, cuda"
READY = ("sdpa *", "flex", "varlen", "flash-attn*")  # on keys that were concatenated before the clock starts
CONCATENATING = ("concatenation + sdpa *",)
BY_ROW = (*READY, *CONCATENATING, "flashinfer by row")  # each row reads the prefix for itself
PEERS = (*BY_ROW, "flashinfer cascade")


@dataclass(frozen=True)
class Target:
    """The least ratio to the quickest of some contestants, by patterns of their names; or a share of the copy rate.

    With `seconds`, the least ratio of so many to the time taken. `subject`: whose it is, by default the case's.
    """

    text: str
    least: float
    over: tuple[str, ...] = ()
    subject: str | None = None
    seconds: float | None = None

    @property
    def bandwidth(self) -> bool:
        return not self.over and self.seconds is None

    def matches(self, name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in self.over)


@dataclass(frozen=True)
class Timed:
    """A case in bfloat16 with its targets; `subject` is which of ours they are for."""

    case: Case
    targets: tuple[Target, ...] = ()
    subject: str = OURS

    @property
    def name(self) -> str:
        return self.case.name

    def shrunk(self) -> Timed:
        """The same kind of case at a size that only shows that it runs; prefixes fill whole pages."""
        return replace(self, case=replace(self.case.shrunk(), prefix=16))


H32_8, H16 = (32, 8), (16, 16)
_BEST_CONCATENATION = "concatenation + the best SDPA"
_BEST_BY_ROW = "best peer that reads the prefix per row"

# One prompt for all rows where the target names no number of them: the cheapest for what concatenates.
TIMED = (
    Timed(
        Case(16, 1, 128, 1024, 1024, H32_8, 128),
        (
            Target("SDPA flash on concatenated keys", 0.95, ("sdpa flash",)),
            Target("concatenation + SDPA flash", 1.3, ("concatenation + sdpa flash",)),
            Target("FlexAttention", 1.0, ("flex",)),
        ),
    ),
    Timed(Case(64, 1, 64, 128, 128, H16, 64), (Target(_BEST_CONCATENATION, 1.5, CONCATENATING),)),
    Timed(
        Case(16, 16, 128, 512, 512, H32_8, 128, backward=True),
        (Target(_BEST_CONCATENATION, 1.2, CONCATENATING),),
    ),
    Timed(
        Case(128, 8, 256, 1, 512, H32_8, 128),
        (
            Target("copy bandwidth", 0.6),
            Target(_BEST_BY_ROW, 1.3, BY_ROW),
            Target("CUDA, copy bandwidth", 0.75, subject=CUDA),
            Target(f"CUDA, {_BEST_BY_ROW}", 1.5, BY_ROW, CUDA),
        ),
        PAGED,
    ),
    Timed(Case(256, 256, 32, 1, 128, H32_8, 128), (Target("best peer", 1.0, PEERS),), PAGED),
    Timed(  # a cartridge
        Case(64, 1, 8192, 1, 128, H32_8, 128),
        (
            Target("CUDA, decoding by row on shared pages", 10.0, ("flashinfer by row",), CUDA),
            Target("CUDA, FlashInfer cascade", 1.1, ("flashinfer cascade",), CUDA),
        ),
        PAGED,
    ),
    Timed(
        Case(8, 8, 64, 1, 256, H32_8, 128),
        (Target("CUDA, best peer", 1.0, PEERS, CUDA), Target("CUDA, 12 us", 1.0, subject=CUDA, seconds=12e-6)),
        PAGED,
    ),
)

CHECKED = (  # forward, and gradients where a case is one of training
    Case(16, 1, 128, 1024, 1024, H32_8, 128),
    Case(16, 16, 128, 512, 512, H32_8, 128, backward=True),
    Case(64, 4, 64, 128, 128, H16, 64, backward=True),
    Case(8, 3, 100, 257, 257, (16, 4), 80, ragged=True, strided=True, padded=True, backward=True),
    Case(4, 2, 64, 1000, 1000, (8, 1), 128, window=256, backward=True),
    Case(4, 2, 100, 300, 300, (8, 2), 64, causal=False, backward=True),
    Case(128, 8, 256, 1, 512, H32_8, 128),
    Case(32, 5, 512, 8, 64, (16, 2), 256, ragged=True),
)


def timed(setting: Setting) -> dict[str, Timed]:
    """The timed cases by name."""
    found: Sequence[Timed] = [case.shrunk() for case in TIMED] if setting.quick else TIMED
    named: dict[str, Timed] = {}
    for case in found:  # two of them shrink to one
        named.setdefault(case.name, case)
    return named


def checked(setting: Setting) -> dict[str, Case]:
    """The checked cases by name."""
    found = [case.shrunk() for case in CHECKED] if setting.quick else CHECKED
    return {case.name: case for case in found}
