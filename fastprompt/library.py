"""The prompts of one backbone by name, and their way into a batch."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from difflib import get_close_matches
from typing import Any
from urllib.parse import quote

import torch
from torch import nn

from fastprompt.bank import Entry, PromptBank
from fastprompt.batch import Extent, PrefixBatch, assemble
from fastprompt.errors import ArgumentError, DuplicatePromptError, IncompatiblePromptError, PromptNotFoundError
from fastprompt.integrations.transformers.backbone import Backbone, evaluating
from fastprompt.prompts import SoftPrompt
from fastprompt.spec import Prefix, unflatten
from fastprompt.store import prompt_digest

_SHOWN = 8  # names of a library that an error lists


def _key(name: str) -> str:
    return quote(name, safe="").replace(".", "%2E")  # a module's name takes no dots


def bank_for(backbone: Backbone, parts: Collection[str], bytes: int | None) -> PromptBank:
    """An empty bank for a backbone's prompts, with room for the `parts` that they enter."""
    room = {site for part in parts for site in backbone.spec.part(part)}
    shapes = [s if i in room else replace(s, kv_heads=0) for i, s in enumerate(backbone.spec.sites)]
    return PromptBank(shapes, dtype=backbone.dtype, devices=backbone.layer_devices, bytes=bytes)


class PromptLibrary(nn.Module):
    """Prompts by name, kept as float32 parameters; their prefixes live in the bank while in use.

    The library is the source, the bank the cache: an evicted or retrained prompt is written to the bank again when a
    batch next asks for it.
    """

    def __init__(self, backbone: Backbone, bank_bytes: int | None = None) -> None:
        super().__init__()
        self.modules_by_key = nn.ModuleDict()
        self._names: dict[str, str] = {}
        self._sources: dict[str, str] = {}  # prompts that share another's virtual tokens
        self._backbone = backbone
        self._bank_bytes = bank_bytes
        self._bank_parts = {"decoder"}  # what the bank has room for: a part that no prompt enters costs nothing
        self._bank: PromptBank | None = None
        self._in_bank: dict[str, tuple[PromptBank, object]] = {}
        self._writing = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts with an empty bank: the prompts are the source."""
        return self.__dict__ | {"_bank": None, "_in_bank": {}, "_writing": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"_writing": threading.Lock()})

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> SoftPrompt:
        if name not in self._names:
            near = get_close_matches(str(name), self._names, n=3)
            some = ", ".join(map(repr, list(self._names)[:_SHOWN])) + (", ..." if len(self) > _SHOWN else "")
            known = (
                f"did you mean {' or '.join(map(repr, near))}?" if near else f"loaded are {some if self else 'none'}"
            )
            raise PromptNotFoundError(f"prompt {name!r} is not loaded: {known}")
        return self.modules_by_key[self._names[name]]  # type: ignore[return-value]

    def add(self, name: str, prompt: SoftPrompt) -> None:
        """Take in a prompt made for this backbone, under a new name."""
        self.check_new(name)
        spec = self._backbone.spec
        if not prompt.fits(spec):
            raise IncompatiblePromptError(
                f"prompt {name!r} was made for {prompt.config.needs(prompt.spec).describe()}, this backbone is "
                f"{prompt.config.needs(spec).describe()}"
            )
        prompt.spec = spec  # one read without its backbone knows no more of it than it needs
        if new := set(spec.parts_of(prompt.config.prefix_layers(spec))) - self._bank_parts:
            self._bank_parts |= new
            self.forget()
        self._names[name] = _key(name)
        self.modules_by_key[_key(name)] = prompt.to(self._backbone.device).train(self.training)

    def share(self, name: str, source: str) -> None:
        """Note that prompt `name` has the virtual tokens of prompt `source`."""
        self._sources[name] = self.source(source)

    def source(self, name: str) -> str:
        """The prompt whose virtual tokens stand for those of `name`: its own, unless it shares another's."""
        return self._sources.get(name, name)

    def check_new(self, name: str) -> None:
        """Raise unless a prompt may get this name."""
        if not isinstance(name, str) or not name:
            raise ArgumentError(f"prompt name is {name!r}, expected a string that is not empty")
        if name in self:
            raise DuplicatePromptError(f"prompt {name!r} exists: remove it first, or choose another name")

    def forget(self) -> None:
        """Empty the bank: prompts are written again when next used, compiled by the backbone as it is then."""
        self._bank = None
        self._in_bank.clear()

    def remove(self, name: str) -> SoftPrompt:
        """Take a prompt out of the library and the bank."""
        prompt = self[name]
        del self.modules_by_key[self._names.pop(name)]
        self._sources.pop(name, None)
        left = [sharer for sharer, source in self._sources.items() if source == name]
        self._sources |= dict.fromkeys(left, left[0] if left else "")  # the first of them stands in
        for sharer in left[:1]:
            del self._sources[sharer]
        self._in_bank.pop(name, None)
        if self._bank is not None and name in self._bank:
            self._bank.remove(name)
        return prompt

    @property
    def bank(self) -> PromptBank:
        """The device arena of prefixes, made on first use."""
        if self._bank is None:
            self._bank = bank_for(self._backbone, self._bank_parts, self._bank_bytes)
        return self._bank

    def _trains(self, name: str) -> bool:
        return any(p.requires_grad for p in self[name].encoder.parameters())

    @contextmanager
    def prefix_batch(self, rows: Sequence[str | None]) -> Iterator[PrefixBatch]:
        """The batch in which row b reads the prefix of prompt `rows[b]`; pinned in the bank inside the context."""
        names = list(dict.fromkeys(filter(None, rows)))
        with ExitStack() as stack:
            if torch.is_grad_enabled():  # a graph may outlive the pins: it gets tensors of its own
                prefixes = self._fresh(names)
                places = {name: i for i, name in enumerate(names)}
                shifts = [self._shift(prefix) for prefix in prefixes]
                yield assemble(prefixes, [places[r] if r else None for r in rows], self._empty(), shifts)
                return
            bank = self.bank
            entries = {name: stack.enter_context(self._resident(name, bank)) for name in names}
            found = {name: Extent(e.start, e.length, e.layers, self._shift(e)) for name, e in entries.items()}
            sites = range(len(self._backbone.spec.sites))
            keys, values = ([arena(i) for i in sites] for arena in (bank.keys, bank.values))
            yield PrefixBatch.build(keys, values, [found[r] if r else None for r in rows])

    def _shift(self, prefix: Prefix | Entry) -> int:
        """How far a prefix moves a row's text: by its length, but not from encoder or cross-attention alone."""
        return prefix.length if min(prefix.layers) < self._backbone.spec.num_layers else 0

    def _empty(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        make = torch.empty
        backbone = self._backbone
        return [
            tuple(make(s.kv_heads, 0, d, dtype=backbone.dtype, device=device) for d in (s.key_dim, s.value_dim))  # type: ignore[misc]
            for s, device in zip(backbone.spec.sites, backbone.layer_devices, strict=True)
        ]

    def _fresh(self, names: Sequence[str]) -> list[Prefix]:
        """Differentiable prefixes; all trainable embedding prompts are compiled in one forward."""
        made = {n: self._copied(n) for n in names if not self._trains(n)}
        made |= {n: self[n]() for n in names if n not in made and self[n].kind == "prefix"}
        rest = [n for n in names if n not in made]
        if rest:
            made |= zip(rest, self._backbone.compile([self[n]() for n in rest]), strict=True)
        return [made[n] for n in names]

    def _copied(self, name: str) -> Prefix:
        """A frozen prompt's prefix out of the bank."""
        bank = self.bank
        with self._resident(name, bank) as entry:
            span = slice(entry.start, entry.start + entry.length)
            keys, values = (
                tuple(arena(layer)[:, span].clone() for layer in entry.layers) for arena in (bank.keys, bank.values)
            )
            return Prefix(entry.layers, keys, values)

    @contextmanager
    def _resident(self, name: str, bank: PromptBank) -> Iterator[Entry]:
        """The prompt's up-to-date extent in the bank, pinned."""
        prompt = self[name]
        version = (bank, prompt.version_key())
        with ExitStack() as stack:
            with self._writing:  # no other batch may evict it between the write and the pin
                if name not in bank or self._in_bank.get(name) != version:
                    write = bank.replace if name in bank else bank.put
                    write(name, self._current(prompt), prompt_digest(prompt))
                    self._in_bank[name] = version
                entry = stack.enter_context(bank.pin([name]))[0]
            yield entry

    @torch.no_grad()
    def _current(self, prompt: SoftPrompt) -> Prefix:
        weights = prompt.weights()
        if prompt.kind == "prefix":
            return unflatten(weights, prompt.spec, prompt.config.prefix_layers(prompt.spec))
        with evaluating(self._backbone.model):
            return self._backbone.compile([weights])[0]

    def _apply(self, function: Any, recurse: bool = True) -> PromptLibrary:
        """Follow the model to another device; prompts stay float32 whatever dtype the backbone takes."""
        super()._apply(lambda t: function(t).float() if t.is_floating_point() else function(t), recurse)
        self.forget()
        return self
