"""Which examples every optimiser step takes: a function of the step and of the jobs' seeds, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastprompt.training.job import Job
from fastprompt.training.tasks.base import Item


class Stream:
    """A job's items in the order in which it trains on them: epoch after epoch, each in an order of its own."""

    def __init__(self, job: Job, items: Sequence[Item]) -> None:
        self.job, self.items = job, items
        self.counts = [job.task.count(item) for item in items]
        self._orders: dict[int, np.ndarray] = {}

    def take(self, step: int) -> list[int]:
        """Indices of the `batch_size` items of a step."""
        first, size = step * self.job.batch_size, len(self.items)
        return [int(self._order(i // size)[i % size]) for i in range(first, first + self.job.batch_size)]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            self._orders[epoch] = np.random.default_rng([self.job.seed, epoch]).permutation(len(self.items))
        return self._orders[epoch]


@dataclass(frozen=True)
class Drawn:
    """An item of job number `job` for one pass; its rows' losses count `weight` times."""

    job: int
    item: Item
    weight: float


class Mixture:
    """The passes (forward and backward) of all steps for one of `processes` processes.

    Semantics: at each step every running job gives `batch_size` items; together they are cut into
    `processes * accumulation` passes of equal size, items of similar length together. A job's weight is one over the
    count of everything it gives in that step, so that losses sum to its mean whatever the cut.
    """

    def __init__(
        self, streams: Sequence[Stream], *, accumulation: int = 1, processes: int = 1, process: int = 0
    ) -> None:
        self.streams = streams
        self.divide(accumulation, processes, process)
        self.totals = [stream.job.total_steps() for stream in streams]
        self.stopped: set[int] = set()

    def divide(self, accumulation: int, processes: int, process: int) -> None:
        """Cut every step for this process of so many, into so many passes each."""
        self.accumulation, self.processes, self.process = accumulation, processes, process

    @property
    def steps(self) -> int:
        """Steps until the last job is done."""
        return max(self.totals)

    def running(self, step: int) -> list[int]:
        """Numbers of the jobs that train in `step`, ascending."""
        return [j for j, total in enumerate(self.totals) if step < total and j not in self.stopped]

    def passes(self, step: int) -> list[list[Drawn]]:
        """What this process takes in each pass of `step`; empty when every job is done."""
        drawn = [drawn for j in self.running(step) for drawn in self._draw(j, step)]
        parts = self.accumulation * self.processes
        if not drawn or parts == 1:
            return [drawn] if drawn else []
        drawn.sort(key=lambda d: max(len(row.input_ids) for row in d.item.rows))
        ends = [len(drawn) * i // parts for i in range(parts + 1)]
        mine = range(self.process, parts, self.processes)
        # a process without items still has to take part in the exchange of gradients: it computes one that counts not
        idle = [Drawn(drawn[0].job, drawn[0].item, 0.0)]
        return [sorted(drawn[ends[i] : ends[i + 1]], key=lambda d: d.job) or idle for i in mine]

    def _draw(self, j: int, step: int) -> list[Drawn]:
        stream = self.streams[j]
        taken = stream.take(step)
        weight = 1.0 / max(1, sum(stream.counts[i] for i in taken))
        return [Drawn(j, stream.items[i], weight) for i in taken]
