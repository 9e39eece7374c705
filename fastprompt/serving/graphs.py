"""Decoding steps as CUDA graphs: recorded for some numbers of rows, replayed with other rows, prompts and pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastprompt.batch import LayerRows, PrefixBatch
from fastprompt.integrations.transformers.paged import PagedMask, PagedRows
from fastprompt.plan import BatchPlan
from fastprompt.serving.runner import Arenas, PackedRunner, PackedStep, Slice

_WARM_UPS = 2  # runs before a recording: what is made on first use must not be made inside


class Recording(Protocol):
    """Work that was recorded once; its result is always the same tensor."""

    result: Tensor

    def replay(self) -> None:
        """Do it again on what its inputs hold now."""


class CudaRecording:
    """A CUDA graph of `work`."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # others load prompts meanwhile
            self.result = work()

    def replay(self) -> None:
        """Do it again on what its inputs hold now."""
        self._graph.replay()


class GraphRunner:
    """A `PackedRunner` whose decoding steps are replayed.

    Semantics::

        every row runs one token,    the recording for the next power of two of rows: lists go into its buffers, rows
        at most `max_rows` of them   that are missing write and read the scratch block, which no row holds
        anything else                the packed runner itself

    The last block of `packed` is the scratch block. `width` is the most blocks a row holds. Recordings are made when
    they are first needed, and again when the bank's arena was reallocated.
    """

    def __init__(
        self,
        packed: PackedRunner,
        max_rows: int,
        width: int,
        record: Callable[[Callable[[], Tensor]], Recording] = CudaRecording,
    ) -> None:
        self.backbone, self.block_size, self.cache = packed.backbone, packed.block_size, packed.cache
        self._packed, self._max_rows, self._width, self._record = packed, max_rows, width, record
        self._steps: dict[int, _DecodeStep] = {}
        self._arena: Any = None

    @torch.inference_mode()
    def run(self, slices: Sequence[Slice], arenas: Arenas) -> Tensor:
        """Logits `[R, V]` of the wanted slices, in their order; good until the next step."""
        decodes = all(s.wanted and len(s.tokens) == 1 for s in slices)
        if not decodes or len(slices) > self._max_rows:
            return self._packed.run(slices, arenas)
        arena = (arenas[0][0].data_ptr(), arenas[0][0].shape)
        if arena != self._arena:
            self._arena, self._steps = arena, {}
        rows = 1 << (len(slices) - 1).bit_length()
        if rows not in self._steps:
            self._steps[rows] = _DecodeStep.make(self._packed, rows, self._width, arenas, self._record)
        return self._steps[rows].run(slices)


@dataclass
class _DecodeStep:
    """Buffers of a step of `rows` rows that all run one token, and its recording."""

    rows: int
    scratch: int
    block_size: int
    step: PackedStep
    extents: Tensor  # int32 [L, 2, rows]: where each layer's prefixes start, and how long they are
    plan: BatchPlan
    recording: Recording

    @staticmethod
    def make(
        packed: PackedRunner,
        rows: int,
        width: int,
        arenas: Arenas,
        record: Callable[[Callable[[], Tensor]], Recording],
    ) -> _DecodeStep:
        device, layers = packed.backbone.device, packed.backbone.spec.num_layers
        scratch = packed.cache.keys[0].shape[0] - 1
        plan = BatchPlan.build([0] * rows, [0] * rows, capacity_rows=rows, queries=[1] * rows, device=device)
        extents = torch.zeros(layers, 2, rows, dtype=torch.int32, device=device)
        reads = tuple(LayerRows(start, length, plan, reads=True) for start, length in extents)
        prefixes = PrefixBatch(tuple(arenas[0][:layers]), tuple(arenas[1][:layers]), reads, (), ())
        own = PagedRows(
            slots=torch.full((rows,), scratch * packed.block_size, device=device),
            block_table=torch.full((rows, width), scratch, dtype=torch.int32, device=device),
            q_start=torch.arange(rows + 1, dtype=torch.int32, device=device),
            kv_len=torch.ones(rows, dtype=torch.int32, device=device),
        )
        step = PackedStep(
            ids=torch.zeros(1, rows, dtype=torch.long, device=device),
            positions=torch.zeros(1, rows, dtype=torch.long, device=device),
            keep=torch.arange(rows, device=device),
            mask=PagedMask(own, packed.cache, prefixes),
        )
        recording = record(lambda: packed.forward(step))
        return _DecodeStep(rows, scratch, packed.block_size, step, extents, plan, recording)

    def run(self, slices: Sequence[Slice]) -> Tensor:
        """Logits `[R, V]` of these rows."""
        missing = self.rows - len(slices)
        own, size = self.step.mask.rows, self.block_size
        _fill(self.step.ids, [[*(s.tokens[0] for s in slices), *[0] * missing]])
        _fill(self.step.positions, [[*(s.positions[0] for s in slices), *[0] * missing]])
        scratch = [self.scratch * size] * missing
        _fill(own.slots, [*(s.blocks[s.first // size] * size + s.first % size for s in slices), *scratch])
        _fill(own.kv_len, [*(s.first + 1 for s in slices), *[1] * missing])
        width = own.block_table.shape[1]
        tables = [[*s.blocks[:width], *[self.scratch] * (width - len(s.blocks))] for s in slices]
        _fill(own.block_table, tables + [[self.scratch] * width] * missing)
        self._point(slices)
        self.recording.replay()
        return self.recording.result[: len(slices)]

    def _point(self, slices: Sequence[Slice]) -> None:
        """Let the rows read these slices' prefixes."""
        layers = range(self.extents.shape[0])
        given = [(s.extent.start, s.extent.length) if s.extent else (0, 0) for s in slices]
        given += [(0, 0)] * (self.rows - len(slices))
        starts, lengths = map(list, zip(*given, strict=True))
        everywhere = all(len(s.extent.layers) >= len(layers) for s in slices if s.extent)
        table = [[starts, lengths]] if everywhere else [[starts, _present(slices, lengths, i)] for i in layers]
        self.extents.copy_(torch.tensor(table, dtype=torch.int32).expand_as(self.extents))
        ones, device = [1] * self.rows, self.extents.device
        self.plan.copy_(BatchPlan.build(starts, lengths, capacity_rows=self.rows, queries=ones, device=device))


def _present(slices: Sequence[Slice], lengths: list[int], layer: int) -> list[int]:
    """Lengths in one layer, 0 where a prompt does not enter it."""
    own = [n if s.extent and layer in s.extent.layers else 0 for s, n in zip(slices, lengths, strict=False)]
    return own + [0] * (len(lengths) - len(own))


def _fill(buffer: Tensor, values: list[Any]) -> None:
    buffer.copy_(torch.tensor(values, dtype=buffer.dtype))
