"""Names whose prompts an administrator keeps in the model."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from fastprompt.errors import BankFullError, PromptNotFoundError

if TYPE_CHECKING:
    from fastprompt.serving.loaded import Loaded, PromptSource

_SHARE = 0.75  # of the budgets at most; the rest is for everybody else


class LoadedPins:
    """Holds on the current versions of some names, renewed when a name is replaced, given up when it is deleted.

    `acquire` and `release` are those of `LoadedPrompts`. All methods but `names` run on its event loop.
    """

    def __init__(
        self,
        registry: PromptSource,
        acquire: Callable[[str], Awaitable[Loaded]],
        release: Callable[[Loaded], None],
        max_prompts: int,
        max_bytes: int,
    ) -> None:
        self._registry, self._acquire, self._release = registry, acquire, release
        self._max_prompts, self._max_bytes = max_prompts, max_bytes
        self._held: dict[str, asyncio.Task[Loaded]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def names(self) -> dict[str, bool]:
        """The names, and whether each is in the model by now."""
        return {name: _loaded(task) is not None for name, task in list(self._held.items())}

    def add(self, name: str) -> None:
        """Errors: PromptNotFoundError, PromptFileError; BankFullError where pins would leave too little for others."""
        if name in self._held:
            return
        names = [*self._held, name]
        size = sum(self._registry.current(n).bytes for n in names if n in self._registry)
        if len(names) > _SHARE * self._max_prompts or size > _SHARE * self._max_bytes:
            raise BankFullError(
                f"with {name!r}, {len(names)} prompts of {size} bytes would be pinned, at most {_SHARE:.0%} of "
                f"{self._max_prompts} prompts and {self._max_bytes} bytes may be: unpin others, or raise the budget"
            )
        self._start(name, None)

    def remove(self, name: str) -> None:
        """Errors: PromptNotFoundError for a name that is not pinned."""
        if name not in self._held:
            raise PromptNotFoundError(f"prompt {name!r} is not pinned")
        self._let_go(self._held.pop(name))

    def renew(self, name: str) -> None:
        """Pin the current version of a name whose pin is of another one, perhaps."""
        before = self._held.get(name)
        if before is not None and before.done():
            self._start(name, before)

    def _start(self, name: str, before: asyncio.Task[Loaded] | None) -> None:
        self._held[name] = asyncio.get_running_loop().create_task(self._keep(name, before))
        self._held[name].add_done_callback(_loaded)  # what it failed with is told to whoever asks for the prompt

    async def _keep(self, name: str, before: asyncio.Task[Loaded] | None) -> Loaded:
        if before is not None:  # nobody asks for the former version any more, and there may be no room for both
            self._let_go(before)
        try:
            return await self._acquire(name)
        except PromptNotFoundError:
            self._held.pop(name, None)
            raise

    def _let_go(self, pin: asyncio.Task[Loaded]) -> None:
        """Release what a pin holds, or will hold."""

        def release(task: asyncio.Task[Loaded]) -> None:
            if (held := _loaded(task)) is not None:
                self._release(held)

        pin.add_done_callback(release)


def _loaded(pin: asyncio.Task[Loaded]) -> Loaded | None:
    """What a pin holds, None where it waits or failed."""
    return pin.result() if pin.done() and not pin.cancelled() and pin.exception() is None else None
