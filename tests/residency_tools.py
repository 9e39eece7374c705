"""Prompts whose every number is one value, so that a mixture of two shows at once; a registry of them; waiting."""

import functools
import threading
from contextlib import contextmanager

import torch
import zoo

from fastprompt import PrefixTuning, PromptedModel, PromptTuning
from fastprompt.prompt_format import prompt_files
from fastprompt.serving.residency import Residency

WAIT = 300.0  # seconds; far above what anything takes, even on a machine that was paused


@functools.cache
def backbone():
    return PromptedModel(zoo.causal("llama"))._info


def spec():
    return backbone().spec


def constant(value, length=4):
    """A prefix prompt of one value."""
    config = PrefixTuning(num_virtual_tokens=length)
    return config.restore(spec(), torch.full((length, config.width(spec())), float(value)))


def files(value, length=4):
    return prompt_files(constant(value, length))


def embedding(seed, length=4):
    return PromptTuning(num_virtual_tokens=length).build(spec(), seed=seed)


def token_bytes():
    return sum(s.width for s in spec().layers) * backbone().dtype.itemsize


def fill(registry, count, length=4):
    """Prompts p0, p1, ... of the values 0, 1, ..."""
    for i in range(count):
        registry.put(f"p{i}", files(i, length))


@contextmanager
def residencies(registry):
    """Makes residencies whose device holds so many tokens; closes them in the end."""
    made = []

    def build(tokens=16, **options):
        device = None if tokens is None else tokens * token_bytes()
        made.append(Residency(backbone(), registry, device_bytes=device, **options))
        return made[-1]

    yield build
    for residency in made:
        residency.close()


def held(residency, lease):
    """What a lease's rows would read: the prefix in the arena."""
    keys, values = residency.arenas()
    e = lease.extent
    span = slice(e.start, e.start + e.length)
    return [t[:, span] for i in e.layers for t in (keys[i], values[i])]


def holds(residency, lease, value):
    return all(bool((t == float(value)).all()) for t in held(residency, lease))


def settle(residency, name):
    """The lease of a prompt, waited for as the engine does."""
    ready = threading.Event()
    residency.on_ready = ready.set
    try:
        while True:
            ready.clear()
            lease = residency.acquire(name)
            if lease is not None:
                return lease
            if not residency.progress():
                assert ready.wait(WAIT), f"{name} never came"
                residency.progress()
    finally:
        residency.on_ready = None
