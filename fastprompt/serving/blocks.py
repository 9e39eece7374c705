"""Blocks of the paged own-token cache: who holds which, and which may be shared."""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from fastprompt.errors import ArgumentError


def salt(secret: bytes, version: str | None) -> bytes:
    """Where a row's chain of block keys begins: an HMAC of its prompt's version, of nothing for a bare row.

    What a token's keys and values are depends on the prompt in front of it, so texts may share blocks under the same
    version only. The secret is the engine's own, so that no key can be found out or made from outside.
    """
    return hmac.digest(secret, b"bare" if version is None else b"prompt:" + version.encode(), "sha256")


def chain(start: bytes, tokens: Sequence[int], block_size: int) -> list[bytes]:
    """Keys of the full blocks of `tokens`: each one's is a digest of its tokens and the key before it."""
    keys = []
    key = start
    for end in range(block_size, len(tokens) + 1, block_size):
        block = b"".join(token.to_bytes(8, "little") for token in tokens[end - block_size : end])
        key = hashlib.sha256(key + block).digest()
        keys.append(key)
    return keys


class BlockPool:
    """`count` blocks of `size` tokens, numbered from 0.

    Semantics:
        take(n)            n blocks of the caller's own; the least recently used of those nobody holds lose their key
        register(b, key)   block b's content is known by `key` from now on, unless another block has it already
        match(keys)        the longest run of registered blocks for keys[0], keys[1], ..., each now held once more
        release(blocks)    the caller holds them no more; one that nobody holds stays registered until it is taken

    Only full blocks that will not change are registered, so sharing never needs a copy.
    """

    def __init__(self, count: int, size: int) -> None:
        if count < 1 or size < 1:
            raise ArgumentError(f"a pool of {count} blocks of {size} tokens was asked for, expected at least 1 of 1")
        self.count, self.size = count, size
        self._holders = [0] * count
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # least recently used first
        self._keys: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}
        self.hit_tokens = self.asked_tokens = 0

    @property
    def free(self) -> int:
        """Blocks that can be taken."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Registered blocks, held or not."""
        return len(self._blocks)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-tokens // self.size)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks, None (and nothing taken) if fewer are free."""
        if count > len(self._free):
            return None
        taken = list(islice(self._free, count))
        for block in taken:
            del self._free[block]
            self._forget(block)
            self._holders[block] = 1
        return taken

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks of the longest known beginning of `keys`, held by the caller too from now on."""
        found = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            self._free.pop(block, None)
            self._holders[block] += 1
            found.append(block)
        return found

    def alone(self, blocks: Sequence[int]) -> int:
        """How many of a holder's blocks nobody else holds."""
        return sum(self._holders[block] == 1 for block in blocks)

    def count_match(self, asked: int, found: int) -> None:
        """Count a `match` whose blocks are put to use."""
        self.asked_tokens += asked * self.size
        self.hit_tokens += found * self.size

    def register(self, block: int, key: bytes) -> None:
        """Let others find a full block by its key."""
        if key not in self._blocks and block not in self._keys:
            self._blocks[key] = block
            self._keys[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back; the end of a text is reused before its beginning, which others are likelier to share."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
                if block not in self._keys:
                    self._free.move_to_end(block, last=False)

    def forget(self) -> None:
        """Let nobody find what is there now; rows that hold blocks keep them."""
        self._keys.clear()
        self._blocks.clear()

    def _forget(self, block: int) -> None:
        key = self._keys.pop(block, None)
        if key is not None:
            del self._blocks[key]
