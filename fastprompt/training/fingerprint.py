"""Whose weights a run trains on: a cheap digest that tells two backbones of equal shapes apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastprompt.heads import head_modules

SAMPLES = 64  # numbers of each tensor that are looked at


def fingerprint(backbone: Any) -> dict[str, str]:
    """The backbone's name, and a digest of its weights: `{"name": ..., "weights": ...}`.

    Semantics: the digest is over name, shape, dtype and `SAMPLES` evenly spaced numbers of every weight; of what is not
    in memory (offloaded to disk) over all but the numbers. The backbone's own task head is left out: prompts have
    theirs, and where a checkpoint has none it is drawn anew at each load.
    """
    heads = tuple(f"{name}." for name in head_modules(backbone))
    digest = hashlib.sha256()
    samples: list[torch.Tensor] = []
    for name, weight in backbone.state_dict().items():
        if isinstance(weight, torch.Tensor) and not name.startswith(heads):
            digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
            samples += [_sample(part) for part in _parts(weight) if part.device.type != "meta"]
    for device in dict.fromkeys(sample.device for sample in samples):  # one transfer a device
        numbers = torch.cat([sample for sample in samples if sample.device == device])
        digest.update(numbers.cpu().numpy().tobytes())
    name = getattr(backbone, "name_or_path", "") or type(backbone).__name__
    return {"name": str(name), "weights": digest.hexdigest()[:16]}


def other_backbone(former: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """How the weights of two backbones differ, by their fingerprints; None where they are the same."""
    if former["weights"] == now["weights"]:
        return None
    return (
        f"it was trained on the backbone {former['name']!r} with weights {former['weights']}, and this one is "
        f"{now['name']!r} with weights {now['weights']}"
    )


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """`SAMPLES` numbers from the first to the last, or all of fewer, float64."""
    flat = weight.detach().reshape(-1)
    if len(flat) > SAMPLES:
        step = (len(flat) - 1) / (SAMPLES - 1)
        flat = flat[torch.tensor([round(i * step) for i in range(SAMPLES)], device=flat.device)]
    return flat.to(torch.float64)


def _parts(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a weight is made of: several where it is quantised."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    names, _ = weight.__tensor_flatten__()
    for name in names:
        yield from _parts(getattr(weight, name))
