"""Prompts whose every number is one value, so that a mixture of two shows at once; a registry of them; waiting."""

import functools
import os
import random
import signal
import threading
import time
from contextlib import contextmanager

import torch
import zoo

from fastprompt import PrefixTuning, PromptedModel, PromptTuning
from fastprompt.errors import PromptNotFoundError
from fastprompt.prompt_format import prompt_files
from fastprompt.serving.registry import PromptRegistry
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


def value_of(registry, name):
    """The number that a stored prompt consists of, None where there is none."""
    try:
        weights = registry.load(registry.current(name)).weights()
    except PromptNotFoundError:
        return None
    assert (weights == weights[0, 0]).all()
    return weights[0, 0].item()


def kill_writers(folder, kills):
    """kill -9 at random moments a process that stores and deletes without end; what is left must be whole.

    For a process of its own: forking takes one without threads and without much memory.
    """
    chance = random.Random(0)
    registry = PromptRegistry(folder, spec())
    contents = {value: files(value) for value in range(4)}
    registry.put("p", contents[0])  # a child may be killed before it does anything
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            try:
                _write_without_end(registry, list(contents.values()))
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.002, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        restarted = PromptRegistry(folder, spec())
        assert set(restarted.names()) <= {"p", "q"}
        assert all(value_of(restarted, name) in contents for name in restarted.names())
        assert sorted(path.name for path in registry.folder.iterdir()) == restarted.names()


def _write_without_end(registry, contents):
    while True:
        for content in contents:
            registry.put("p", content)
            registry.put("q", content)
        registry.delete("q")


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
