"""The layout PEFT 0.21 writes, which reading follows and writing undoes.

A prefix is `[P, 2L, H, D]`, the key of layer l in slot 2l and its value in slot 2l + 1. For an encoder-decoder PEFT
repeats the slots once and deals them out four a layer, of which the decoder's self-attention takes the first two:
layer l reads slots 4l and 4l + 1, modulo 2L. With L even, layers l and l + L/2 so read the same slots; with L odd all
differ, and PEFT ignores layers beyond the decoder's, so an even L is written as L + 1.
"""

from __future__ import annotations

from collections.abc import Collection

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SUPPORTED = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CARTRIDGE")
HEADS = ("classifier", "score", "qa_outputs")
SEQ2SEQ = "SEQ_2_SEQ_LM"


def slot_pair(layer: int, layers: int) -> int:
    """Which of PEFT's `layers` key/value slot pairs an encoder-decoder's decoder layer reads."""
    return 2 * layer % layers


def module_of(name: str, saved: Collection[str]) -> str | None:
    """The shortest module path in a parameter's `name` that PEFT would match with one of `saved`."""
    parts = name.split(".")
    paths = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((path for path in paths if path.endswith(tuple(saved))), None)
