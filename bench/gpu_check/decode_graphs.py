"""Decoding of an 8-billion-parameter model in CUDA graphs: 64 rows of 64 prompts against the same rows without any.

The bare backbone decodes through the same buffers, pages and graphs, so that the ratio is what prompts cost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from bench import measure
from bench.backbones import LlamaSize, llama
from bench.gpu_check import models, timing
from bench.gpu_check.models import Backbones, Named
from bench.gpu_check.records import Emit, NotAvailable
from bench.gpu_check.setting import OURS, Setting
from bench.measure import Spread
from fastprompt.batch import Extent
from fastprompt.integrations.transformers.probe import inspect_backbone
from fastprompt.serving.graphs import GraphRunner
from fastprompt.serving.runner import Arenas, PackedRunner, Runner, Slice

TARGET = 0.97  # of the bare backbone's tokens a second
_BLOCK = 16  # tokens of a page
_BYTES = 80e9  # of a GPU that the model, its oracle in float32 and their caches need
_CALLS = 8


@dataclass(frozen=True)
class Shape:
    """A backbone, rows of as many prompts, virtual tokens of each, own tokens of a row, and rounds."""

    size: LlamaSize
    rows: int
    prefix: int
    own: int
    rounds: int


FULL = Shape(LlamaSize(32, 4096, 32, 8, 14336, 128256), 64, 64, 512, 9)
QUICK = Shape(LlamaSize(2, 64, 4, 2, 128, 100), 3, 5, 18, 2)


def run(setting: Setting, emit: Emit) -> None:
    """Logits against float32, then both in turns; `CheckFailed` where ours are wrong."""
    shape = QUICK if setting.quick else FULL
    if setting.on_gpu and torch.cuda.get_device_properties(setting.device).total_memory < _BYTES:
        raise NotAvailable(f"the GPU has less than {_BYTES / 1e9:g} GB")
    model = llama(shape.size, dtype=torch.bfloat16, device=setting.device)
    with torch.inference_mode():
        step = decoder(model, shape, setting, graphs=True)
        right = oracle(model, shape, setting)
        found = {"logits": step(True).clone()}
        emit("check", who=OURS, errors=right.errors(OURS, found, 4.0 if setting.quick else 1.0))
        names = {OURS: True, "bare": False}
        ready = {name: timed(step, prompted) for name, prompted in names.items()}
        samples = timing.interleave(ready, shape.rounds, setting.device)
    for name, taken in samples.items():
        spread = asdict(Spread.of([s.wall for s in taken]))
        emit("time", name=name, launch="graph", buffers="warm", seconds=spread, calls=_CALLS, sets=1)
    ratio = measure.ratio(samples, "bare", OURS).wall
    emit("ratio", over="bare", under=OURS, launch="graph", buffers="warm", ratio=asdict(ratio))
    met = None if setting.quick else ratio.median >= TARGET
    text = "tokens a second of the bare backbone"
    emit("verdict", target=text, least=TARGET, value=ratio.median, over="bare", met=met)


def oracle(model: PreTrainedModel, shape: Shape, setting: Setting) -> Any:
    """What plain PyTorch computes in float32, and how far it is off in bfloat16."""

    def logits(one: PreTrainedModel) -> Named:
        return {"logits": decoder(one, shape, setting, graphs=False)(True)}

    right = models.truth(logits, Backbones(shape.size, model, copy.deepcopy(model).float()))
    timing.release()
    return right


def decoder(model: PreTrainedModel, shape: Shape, setting: Setting, graphs: bool) -> Callable[[bool], torch.Tensor]:
    """One decoding step of all rows, with their prompts or without: its logits."""
    backbone = inspect_backbone(model)
    each = -(-shape.own // _BLOCK)
    packed = PackedRunner(backbone, shape.rows * each + 1, _BLOCK)
    generator = torch.Generator(setting.device).manual_seed(1)
    for cache in (*packed.cache.keys, *packed.cache.values):
        cache.copy_(torch.randn(cache.shape, device=cache.device, generator=generator))  # in float32 for every dtype
    arenas = prompts(model, shape, generator)
    rows = {prompted: list(slices(shape, each, prompted)) for prompted in (True, False)}
    runners = {prompted: runner(packed, shape, each, setting, graphs) for prompted in rows}
    return lambda prompted: runners[prompted].run(rows[prompted], arenas)


def runner(packed: PackedRunner, shape: Shape, width: int, setting: Setting, graphs: bool) -> Runner:
    """What runs the step: recorded where that is asked for and there is a GPU."""
    if not graphs or not setting.on_gpu:
        return packed
    return GraphRunner(packed, shape.rows, width)


def prompts(model: PreTrainedModel, shape: Shape, generator: torch.Generator) -> Arenas:
    """Random prompts side by side, the same for every layer."""
    config, weight = model.config, next(model.parameters())
    dim = config.hidden_size // config.num_attention_heads
    size = (config.num_key_value_heads, shape.rows * shape.prefix, dim)
    keys, values = (torch.randn(size, device=weight.device, generator=generator).to(weight.dtype) for _ in range(2))
    return [keys] * config.num_hidden_layers, [values] * config.num_hidden_layers


def slices(shape: Shape, each: int, prompted: bool) -> Any:
    """The rows of the step, each with its own pages and, where it has one, its own prompt."""
    layers = tuple(range(shape.size.layers))
    for row in range(shape.rows):
        extent = Extent(row * shape.prefix, shape.prefix, layers, shape.prefix) if prompted else None
        blocks = range(row * each, (row + 1) * each)
        yield Slice([1 + row % (shape.size.vocabulary - 1)], shape.own - 1, list(blocks), extent, True, ())


def timed(step: Callable[[bool], torch.Tensor], prompted: bool) -> timing.Timed:
    """Some steps in a row."""

    def run() -> None:
        for _ in range(_CALLS):
            step(prompted)

    return timing.Timed(run, _CALLS, lambda: step(prompted))
