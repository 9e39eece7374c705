"""Blocks are held by whoever took or matched them, and found again by what they hold."""

import random

import pytest

from fastprompt.errors import ArgumentError
from fastprompt.serving.blocks import BlockPool, chain, salt


def test_salt_tells_prompts_versions_and_secrets_apart():
    salts = {salt(s, v) for s in (b"one", b"two") for v in (None, "", "bare", "a", "b")}
    assert len(salts) == 10
    assert salt(b"one", "a") == salt(b"one", "a")


def test_chain_covers_full_blocks_and_depends_on_all_before():
    keys = chain(b"s", [1, 2, 3, 4, 5, 6, 7], 3)
    assert len(keys) == 2
    assert chain(keys[0], [4, 5, 6], 3) == keys[1:]
    assert chain(b"s", [9, 2, 3, 4, 5, 6], 3)[1] != keys[1]
    assert chain(b"t", [1, 2, 3], 3) != keys[:1]
    # ids beyond a byte, and the same digits cut otherwise
    assert chain(b"s", [1, 256], 2) != chain(b"s", [257, 0], 2)


def test_take_gives_each_block_once_or_nothing():
    pool = BlockPool(5, 4)
    first = pool.take(3)
    assert pool.take(3) is None and pool.free == 2
    second = pool.take(2)
    assert sorted(first + second) == list(range(5))
    pool.release(first)
    assert pool.free == 3 and pool.take(0) == []


def test_matched_blocks_are_shared_until_the_last_holder_is_gone():
    pool = BlockPool(4, 2)
    keys = chain(b"s", [1, 2, 3, 4], 2)
    blocks = pool.take(2)
    for block, key in zip(blocks, keys, strict=True):
        pool.register(block, key)
    assert pool.match(keys) == blocks
    pool.release(blocks)
    assert pool.free == 2  # the second holder has them still
    pool.release(blocks)
    assert pool.free == 4 and pool.match(keys[:1]) == blocks[:1]
    assert pool.match(chain(b"t", [1, 2], 2)) == []


def test_a_text_is_forgotten_from_its_end():
    pool = BlockPool(3, 1)
    keys = chain(b"s", [1, 2, 3], 1)
    blocks = pool.take(3)
    for block, key in zip(blocks, keys, strict=True):
        pool.register(block, key)
    pool.release(blocks)
    pool.take(1)
    found = pool.match(keys)
    assert found == blocks[:2]


def test_one_content_has_one_block():
    pool = BlockPool(3, 1)
    a, b = pool.take(2)
    (key,) = chain(b"s", [7], 1)
    pool.register(a, key)
    pool.register(b, key)
    assert pool.cached == 1 and pool.match([key]) == [a]


@pytest.mark.parametrize(("count", "size"), [(0, 4), (4, 0)])
def test_a_pool_holds_something(count, size):
    with pytest.raises(ArgumentError, match="at least 1 of 1"):
        BlockPool(count, size)


@pytest.mark.parametrize("seed", range(20))
def test_random_use_never_hands_out_a_block_that_is_held(seed):
    rng = random.Random(seed)
    pool = BlockPool(12, 2)
    texts = [[rng.randrange(3) for _ in range(8)] for _ in range(4)]
    content: dict[int, bytes] = {}  # what a registered block holds
    rows: list[list[int]] = []
    for _ in range(400):
        if rows and rng.random() < 0.5:
            pool.release(rows.pop(rng.randrange(len(rows))))
        else:
            keys = chain(b"s", rng.choice(texts), 2)[: rng.randrange(5)]
            found = pool.match(keys)
            assert [content[b] for b in found] == keys[: len(found)]
            taken = pool.take(len(keys) - len(found))
            if taken is None:
                pool.release(found)
                continue
            held = {b for row in rows for b in row} | set(found)
            assert held.isdisjoint(taken)
            for block, key in zip(taken, keys[len(found) :], strict=True):
                content[block] = key
                pool.register(block, key)
            rows.append(found + taken)
        assert pool.free == pool.count - len({b for row in rows for b in row})
