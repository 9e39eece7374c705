"""An engine from a model and a folder of prompts: which runner it gets, and how much memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastprompt.batch import Extent
from fastprompt.errors import ArgumentError, UnsupportedError
from fastprompt.integrations.transformers.backbone import Backbone
from fastprompt.integrations.transformers.probe import inspect_backbone
from fastprompt.serving.blocks import BlockPool
from fastprompt.serving.engine import Engine, Limits
from fastprompt.serving.graphs import GraphRunner
from fastprompt.serving.padded import PaddedRunner
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.residency import HOST_BYTES, Residency
from fastprompt.serving.runner import PackedRunner, Runner, Slice
from fastprompt.serving.scheduler import Rules

_log = logging.getLogger(__name__)
_DEFAULT_LENGTH = 4096  # tokens of a row, where the backbone names no limit
_PROBE_TOKENS = (2, 3)  # of a text that is run in two pieces
_PROBE_PREFIX = 3
_APART = "tokens reach others outside of attention, as in a convolution or a recurrence"
_KV_BYTES = 2**31


@dataclass(frozen=True)
class EngineOptions:
    """How much an engine takes.

    `kv_bytes` holds own tokens (None: room for `max_rows` rows of `max_model_len`, at most 2 GiB); `device_bytes` and
    `host_bytes` hold prompts on the device (None: as many as come) and beside it, there as `storage` says.
    `max_model_len` None is what the backbone can do, at most 4096.
    """

    rules: Rules = field(default_factory=Rules)
    block_size: int = 16
    kv_bytes: int | None = None
    device_bytes: int | None = 2**30
    host_bytes: int = HOST_BYTES
    max_model_len: int | None = None
    storage: str = "model"


def build_engine(model: Any, prompts: str | Path, options: EngineOptions | None = None) -> Engine:
    """An engine that serves the prompts in a folder over a transformers model that generates text.

    Raises ArgumentError for a model that does not, UnsupportedError for encoder-decoders.
    """
    options = options or EngineOptions()
    if not model.can_generate():
        raise ArgumentError(f"the backbone is a {type(model).__name__}, expected a model that generates text")
    backbone = inspect_backbone(model.eval())
    if backbone.encoder_decoder:
        raise UnsupportedError(f"{backbone.spec.describe()} is an encoder-decoder: the engine serves decoders alone")
    length, size = _longest(backbone, options), options.block_size
    pool = BlockPool(_blocks(backbone, length, options), size)
    limits = Limits(length, backbone.spec.vocab_size, _end_tokens(backbone), pool.count * size)
    residency = Residency(
        backbone,
        PromptRegistry(prompts, backbone.spec),
        device_bytes=options.device_bytes,
        host_bytes=options.host_bytes,
        storage=options.storage,
    )
    return Engine(make_runner(backbone, pool, limits, options.rules), pool, residency, limits, options.rules)


def make_runner(backbone: Backbone, pool: BlockPool, limits: Limits, rules: Rules) -> Runner:
    """A packed runner where it gives what the backbone alone gives, a padded one elsewhere, with the reason logged.

    On a GPU the packed runner's decoding steps are CUDA graphs.
    """
    reason = "its attention does not go through the attention interface"
    if len(set(backbone.layer_devices)) > 1:
        reason = "its layers are on several devices"
    elif backbone.path == "attention":
        graphs = backbone.device.type == "cuda"
        runner = PackedRunner(backbone, pool.count + graphs, pool.size)
        reason = _difference(backbone, runner)
        if not reason:
            width = pool.blocks_for(limits.max_model_len)
            return GraphRunner(runner, rules.max_rows, width) if graphs else runner
    _log.warning("%s runs padded, which is slower: %s", backbone.spec.describe(), reason)
    return PaddedRunner(backbone)


@torch.inference_mode()
def _difference(backbone: Backbone, runner: PackedRunner) -> str:
    """Why packed logits are not those of the padded way, on two texts with a prefix and without; empty if they are."""
    longest = sum(_PROBE_TOKENS)
    texts = [[3 + i for i in range(longest)], [4 + i for i in range(_PROBE_TOKENS[1])]]
    size = runner.block_size
    per_row = -(-longest // size)
    if runner.cache.keys[0].shape[0] < 2 * per_row:
        raise ArgumentError(f"kv_bytes holds fewer than {2 * per_row} blocks of {size} tokens: raise it")
    blocks = [list(range(per_row)), list(range(per_row, 2 * per_row))]
    arenas = _probe_arenas(backbone)
    extents = (Extent(0, _PROBE_PREFIX, tuple(range(backbone.spec.num_layers)), _PROBE_PREFIX), None)
    cuts = [(0, _PROBE_TOKENS[0]), (_PROBE_TOKENS[0], longest)]
    try:
        for low, high in cuts:
            last = high == longest
            slices = [
                Slice(text[low:high], low, held, extent, last or high >= len(text), text)
                for text, held, extent in zip(texts, blocks, extents, strict=True)
                if text[low:high]
            ]
            packed = runner.run(slices, arenas)
        expected = PaddedRunner(backbone).run(slices, arenas)
        with _poisoned(backbone, len(slices[0].tokens)):
            beside = runner.run(slices, arenas)
    except Exception as error:  # whatever an architecture does with packed rows, it can go the other way
        return f"running packed rows failed: {error!r}"
    if not (beside[0].isnan().all() and beside[1].isfinite().all()):
        return _APART
    worst = (packed.float() - expected.float()).abs().max().item()
    allowed = 64 * torch.finfo(backbone.dtype).eps * max(1.0, expected.float().abs().max().item())
    return "" if worst <= allowed else f"packed logits differ by {worst:.3g}, {allowed:.3g} allowed"


@contextmanager
def _poisoned(backbone: Backbone, count: int) -> Iterator[None]:
    """Make the first `count` token embeddings NaN: what they reach shows, in any dtype and however faint it is."""

    def poison(module: torch.nn.Module, args: object, embedded: torch.Tensor) -> torch.Tensor:
        embedded = embedded.clone()
        embedded[:, :count] = torch.nan
        return embedded

    hook = backbone.model.get_input_embeddings().register_forward_hook(poison)
    try:
        yield
    finally:
        hook.remove()


def _probe_arenas(backbone: Backbone) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random prefixes of a few tokens in every layer."""
    generator = torch.Generator().manual_seed(0)
    layers = list(zip(backbone.spec.layers, backbone.layer_devices, strict=True))

    def draw(heads: int, dim: int, device: torch.device) -> torch.Tensor:
        return torch.randn(heads, _PROBE_PREFIX, dim, generator=generator).to(device, backbone.dtype)

    keys = [draw(shape.kv_heads, shape.key_dim, device) for shape, device in layers]
    values = [draw(shape.kv_heads, shape.value_dim, device) for shape, device in layers]
    return keys, values


def _longest(backbone: Backbone, options: EngineOptions) -> int:
    """Tokens of a row, the virtual ones too."""
    config = backbone.model.config.get_text_config(decoder=True)
    positions = backbone.max_positions or getattr(config, "max_position_embeddings", None) or _DEFAULT_LENGTH
    length = options.max_model_len or min(positions, _DEFAULT_LENGTH)
    if not 1 <= length <= positions:
        raise ArgumentError(f"max_model_len is {length}, expected 1 to the backbone's {positions} positions")
    return length


def _end_tokens(backbone: Backbone) -> tuple[int, ...]:
    ends = backbone.model.generation_config.eos_token_id
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)


def _blocks(backbone: Backbone, length: int, options: EngineOptions) -> int:
    size = options.block_size
    block_bytes = PackedRunner.block_bytes(backbone, size)
    wanted = options.rules.max_rows * -(-length // size)
    if options.kv_bytes is None:
        return max(1, min(wanted, _KV_BYTES // max(block_bytes, 1)))
    if options.kv_bytes < block_bytes:
        raise ArgumentError(f"kv_bytes is {options.kv_bytes}, expected at least one block of {block_bytes}")
    return options.kv_bytes // block_bytes
