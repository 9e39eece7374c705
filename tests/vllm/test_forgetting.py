"""Which pages are taken out of vLLM's prefix cache when a prefix could not be loaded."""

from types import SimpleNamespace

from fastprompt.integrations.vllm.forgetting import CacheMemory


class Pool:
    """Cached pages by hash, several of one hash at times, as vLLM's."""

    def __init__(self, *cached):
        self.cached = list(cached)

    def get_cached_block(self, block_hash, groups):
        assert groups == [0]
        found = [number for number, held in self.cached if held == block_hash]
        return [SimpleNamespace(block_id=found[0])] if found else None

    def evict_blocks(self, numbers):
        self.cached = [entry for entry in self.cached if entry[0] not in numbers]


def request(salt, *hashes):
    return SimpleNamespace(cache_salt=salt, block_hashes=list(hashes))


def memory(*cached):
    made = CacheMemory()
    made.pool = Pool(*cached)
    return made


def test_all_that_began_under_the_salt_is_forgotten_and_nothing_else():
    held = memory((1, "a0"), (2, "a1"), (3, "a2"), (4, "a2"), (5, "b0"), (6, "bare"))
    held.begins(request("a", "a0", "a1"), (1, 2))
    held.begins(request("b", "b0"), (5,))
    held.begins(request(None, "bare"), (6,))
    held.step()
    held.begins(request("a", "a0", "a2"), (7, 8))  # its pages were taken again since
    held.forget({1, 99})
    assert held.pool.cached == [(5, "b0"), (6, "bare")]


def test_nothing_is_forgotten_where_nothing_failed_nor_what_began_long_ago():
    held = memory((1, "a0"))
    held.begins(request("a", "a0"), (1,))
    for invalid in (set(), None, {2}):
        held.forget(invalid)
    for _ in range(100):
        held.step()
    held.forget({1})
    assert held.pool.cached == [(1, "a0")]
