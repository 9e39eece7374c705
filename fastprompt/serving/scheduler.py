"""Which rows run in the next step, and how many tokens of each: shared fairly between prompts."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from heapq import heapify, heappop, heappush

from fastprompt.errors import FastPromptError
from fastprompt.serving.blocks import BlockPool, chain
from fastprompt.serving.forecast import Forecast
from fastprompt.serving.row import Row

Tenant = str | None  # a prompt's name, None for bare rows
_TRIES = 4  # rows whose prompt is asked for in a step, for each that may run: it may not be there yet


class Admission(Enum):
    """Whether a row has its prompt: yes; not yet, it is on its way; or no, prompts in use leave no room for it."""

    READY = "ready"
    LATER = "later"
    CROWDED = "crowded"


@dataclass(frozen=True)
class Piece:
    """`count` tokens of a row, from its first one that is not computed; `complete` if they are all of the row's."""

    row: Row
    count: int
    complete: bool


@dataclass(frozen=True)
class Rules:
    """How much runs at once.

    A row that has run `quantum` tokens since it was admitted may have to wait again, so that a prompt with no row
    running gets one. `share_blocks` lets equal texts of the same prompt version share their blocks.
    """

    max_rows: int = 64
    max_batch_tokens: int = 2048
    quantum: int = 32
    share_blocks: bool = True


class Scheduler:
    """Waiting rows by prompt, running rows in order of admission.

    Semantics of a step, with a budget of `max_batch_tokens`::

        rows that only decode run first, one token each
        unfinished texts go on, those of the least served prompt first, cut where the budget ends
        waiting rows are admitted, the least served prompt's first, while rows, budget and blocks are left, also those
                                       that rows will want until they end (`Forecast`)
        no block for a running row     the newest running row is preempted: its blocks are released, its tokens kept
        no place for a prompt that has no row running, and another has more than its share
                                       that one's newest row past its quantum is preempted

    What a prompt was served is counted in tokens; one that comes anew starts level with the least served one.
    `admit(row)` acquires the prompt, or raises what ends the row; `start(row)` is where its chain of block keys begins.
    """

    def __init__(
        self,
        pool: BlockPool,
        rules: Rules,
        admit: Callable[[Row], Admission],
        start: Callable[[Row], bytes],
    ) -> None:
        self.pool, self.rules = pool, rules
        self._admit, self._start = admit, start
        self._waiting: dict[Tenant, deque[Row]] = {}
        self._served: dict[Tenant, int] = {}
        self._ran: dict[Row, int] = {}  # running rows: tokens since admission
        self.failed: list[tuple[Row, FastPromptError]] = []
        self._forecast = Forecast(pool)
        self._short: Row | None = None  # what there were no blocks for, since when no row has left
        self.preemptions = 0

    @property
    def running(self) -> list[Row]:
        """In order of admission."""
        return list(self._ran)

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def waiting_by_prompt(self) -> dict[Tenant, int]:
        return {tenant: len(rows) for tenant, rows in self._waiting.items()}

    def running_by_prompt(self) -> Counter[Tenant]:
        return Counter(row.prompt for row in self._ran)

    def add(self, row: Row) -> None:
        """A new row waits, behind those of its prompt."""
        self._level(row.prompt)
        self._waiting.setdefault(row.prompt, deque()).append(row)

    def remove(self, row: Row) -> None:
        """The row is done, or wanted no more: its blocks and its prompt are free."""
        self._short = None
        if row in self._ran:
            del self._ran[row]
            self._forecast.ended(row)
        elif row in (queue := self._waiting.get(row.prompt, ())):
            queue.remove(row)  # type: ignore[union-attr]
            self._tidy(row.prompt)
        self._release(row)
        if row.lease is not None:
            row.lease.release()
            row.lease = None

    def schedule(self) -> list[Piece]:
        """The next step's pieces; rows whose prompt could not be acquired are in `failed`."""
        self._make_place()
        budget = self.rules.max_batch_tokens
        pieces: list[Piece] = []
        for row in sorted(self._ran, key=lambda row: (row.due > 1, self._served[row.prompt])):
            if budget and row in self._ran:
                budget -= self._go_on(row, min(row.due, budget), pieces)
        if len(self._ran) < self.rules.max_rows:
            self._admit_some(budget, pieces)
        return pieces

    def ran(self, pieces: list[Piece]) -> None:
        """The pieces were computed: count them, and let others share the blocks that are full now."""
        for piece in pieces:
            row = piece.row
            row.computed += piece.count
            self._ran[row] += piece.count
            if self.rules.share_blocks:
                self._register(row)

    # running rows ----------------------------------------------------------------------------------------------------

    def _go_on(self, row: Row, count: int, pieces: list[Piece]) -> int:
        """Add a piece of a running row; 0 if it had to be preempted itself."""
        while not self._grow(row, row.computed + count):
            chosen = {piece.row for piece in pieces}
            victim = next(other for other in reversed(self._ran) if other not in chosen)
            self._preempt(victim)
            if victim is row:
                return 0
        return self._take(row, count, pieces)

    def _take(self, row: Row, count: int, pieces: list[Piece]) -> int:
        """Add a piece to the step, at its prompt's cost."""
        pieces.append(Piece(row, count, count == row.due))
        self._served[row.prompt] += count
        return count

    def _grow(self, row: Row, tokens: int) -> bool:
        """Blocks for the row's first `tokens`."""
        missing = self.pool.blocks_for(tokens) - len(row.blocks)
        if missing > 0:
            taken = self.pool.take(missing)
            if taken is None:
                return False
            row.blocks += taken
        return True

    def _preempt(self, row: Row) -> None:
        """Back to the front of its prompt's queue; what it computed may still be found in the pool."""
        del self._ran[row]
        self._short = None
        self._release(row)
        self._waiting.setdefault(row.prompt, deque()).appendleft(row)
        self.preemptions += 1

    def _release(self, row: Row) -> None:
        self.pool.release(row.blocks)
        row.blocks, row.keys, row.computed, row.shared = [], [], 0, 0

    def _register(self, row: Row) -> None:
        full = row.computed // self.pool.size
        if full > row.shared:
            before = row.keys[row.shared - 1] if row.shared else self._start(row)
            tokens = row.tokens[row.shared * self.pool.size : full * self.pool.size]
            row.keys = row.keys[: row.shared] + chain(before, tokens, self.pool.size)
            for i in range(row.shared, full):
                self.pool.register(row.blocks[i], row.keys[i])
            row.shared = full

    # waiting rows ----------------------------------------------------------------------------------------------------

    def _admit_some(self, budget: int, pieces: list[Piece]) -> None:
        """Admit first rows of prompts' queues, the least served prompt's first, until something runs out.

        Once a row found no room for its prompt, no later one gets a prompt in this step: so rows that run end, and
        make room for it, however large it is.
        """
        queue = [(self._served[tenant], i, tenant) for i, tenant in enumerate(self._waiting)]
        heapify(queue)
        tries = _TRIES * self.rules.max_rows  # of rows that have no prompt yet
        while queue and budget and len(self._ran) < self.rules.max_rows:
            _, i, tenant = heappop(queue)
            row = self._waiting[tenant][0]
            if row.prompt is not None and row.lease is None:  # rows that hold theirs may keep others from getting one
                if not tries:
                    continue
                tries -= 1
            answer = self._acquire(row)
            if answer is Admission.READY and (row is self._short or not self._place(row)):
                self._short = row
                return
            if answer is Admission.READY:
                self._unqueue(row)
                self._ran[row] = 0
                budget -= self._take(row, min(row.due, budget), pieces)
            elif answer is Admission.CROWDED:
                tries = 0
            if answer in (Admission.READY, None) and tenant in self._waiting:
                heappush(queue, (self._served[tenant], i, tenant))

    def _acquire(self, row: Row) -> Admission | None:
        """Whether the row has its prompt; None if it never will."""
        try:
            return self._admit(row)
        except FastPromptError as error:
            self._unqueue(row)
            self.failed.append((row, error))
            return None

    def _place(self, row: Row) -> bool:
        """Blocks for all of the row's tokens, known ones first; nothing is held if there are or will be too few."""
        known = row.tokens[: len(row.tokens) - 1]  # the last token must run: the next one is chosen from it
        keys = chain(self._start(row), known, self.pool.size) if self.rules.share_blocks else []
        row.blocks = self.pool.match(keys)
        row.shared = len(row.blocks)
        row.keys = keys[: row.shared]
        row.computed = row.shared * self.pool.size
        wise = not self._ran or self._forecast.fits([*self._ran, row])
        if not (wise and self._grow(row, len(row.tokens))):
            self._release(row)
            return False
        self.pool.count_match(len(keys), row.shared)
        return True

    def _unqueue(self, row: Row) -> None:
        self._waiting[row.prompt].remove(row)
        self._tidy(row.prompt)

    # fairness --------------------------------------------------------------------------------------------------------

    def _make_place(self) -> None:
        """Preempt for prompts that wait without any row running, while others have more than their share."""
        full = len(self._ran) >= self.rules.max_rows
        if not full and self._short is None:
            return
        running = self.running_by_prompt()
        starving = [tenant for tenant in self._waiting if tenant not in running]
        tenants = max(1, len(starving) + len(running))
        share = max(1, self.rules.max_rows // tenants) if full else 1 + len(self._ran) // tenants
        for _ in starving:
            victim = next(
                (r for r in reversed(self._ran) if running[r.prompt] > share and self._ran[r] >= self.rules.quantum),
                None,
            )
            if victim is None:
                return
            running[victim.prompt] -= 1
            self._preempt(victim)

    def _level(self, tenant: Tenant) -> None:
        """A prompt that comes anew owes nobody and is owed nothing."""
        active = set(self._waiting) | {row.prompt for row in self._ran}
        if tenant not in active:
            self._served = {t: n for t, n in self._served.items() if t in active}
            self._served[tenant] = min(self._served.values(), default=0)

    def _tidy(self, tenant: Tenant) -> None:
        if not self._waiting.get(tenant, True):
            del self._waiting[tenant]
