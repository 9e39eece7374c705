"""A folder's names while others change it: nothing lost, nothing that is gone, whoever writes while it is listed."""

import os
import random
import time
from contextlib import contextmanager

import pytest

from fastprompt.serving import listing
from fastprompt.serving.listing import SETTLED_NS, Listing


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A listing of p00 to p19, which looks at three entries at a time."""
    monkeypatch.setattr(listing, "_SLICE", 3)
    for i in range(20):
        (tmp_path / f"p{i:02}").mkdir()
    made = Listing(tmp_path)
    assert made.refresh() and len(made) == 20
    return made


def _touch(folder):
    """A folder time that no listing has seen, and that is old enough to be believed."""
    _touch.age = getattr(_touch, "age", 0) + 10**9
    os.utime(folder, ns=(_touch.age, _touch.age))


def test_it_follows_whatever_others_do(small):
    rng, there = random.Random(0), set(small.page(None, None))
    for _ in range(60):
        before = set(there)
        for _ in range(rng.randrange(4)):
            name = f"p{rng.randrange(40):02}"
            if name in there:
                (small.folder / name).rmdir()
                there.discard(name)
            else:
                (small.folder / name).mkdir()
                there.add(name)
        generation = small.generation
        _touch(small.folder)
        assert small.refresh() == (there != before) == (small.generation != generation)
        assert small.page(None, None) == sorted(there) and len(small) == len(there)
        assert all((f"p{i:02}" in small) == (f"p{i:02}" in there) for i in range(40))
    assert not small.refresh()


def test_a_folder_that_became_a_file_is_no_prompt_any_more(small):
    (small.folder / "p03").rmdir()
    (small.folder / "p03").write_text("")
    _touch(small.folder)
    assert small.refresh() and "p03" not in small and len(small) == 19


def test_what_is_written_while_it_lists_counts(small, monkeypatch):
    """Names that this object stores and removes between two slices, whether the listing has seen them or not."""
    order = [entry.name for entry in os.scandir(small.folder)]
    seen, unseen = order[0], order[-1]  # long before, and after the first rest
    (small.folder / "other").mkdir()
    acts = [
        lambda: (small.remove(seen), (small.folder / seen).rmdir()),
        lambda: (small.remove(unseen), (small.folder / unseen).rmdir()),
        lambda: ((small.folder / "own").mkdir(), small.add("own")),
        lambda: (small.remove("p10"), small.add("p10")),
    ]
    monkeypatch.setattr(listing.time, "sleep", lambda seconds: acts and acts.pop(0)())
    _touch(small.folder)
    assert small.refresh(1.0) and not acts
    assert small.page(None, None) == sorted({*order, "own", "other"} - {seen, unseen})


def test_a_name_that_a_listing_misses_is_looked_at_once_more(small, monkeypatch):
    """While a folder is replaced, under its name or another, a directory may show neither."""
    real = os.scandir

    @contextmanager
    def blind(path):
        with real(path) as entries:
            yield (entry for entry in entries if entry.name not in ("p05", "p06"))

    (small.folder / "p06").rmdir()
    monkeypatch.setattr(os, "scandir", blind)
    _touch(small.folder)
    assert small.refresh() and "p05" in small and "p06" not in small and len(small) == 19


def test_it_rests_only_where_it_is_told_to(small, monkeypatch):
    rests = []
    monkeypatch.setattr(listing.time, "sleep", rests.append)
    _touch(small.folder)
    small.refresh()
    assert rests == []
    _touch(small.folder)
    small.refresh(0.25)
    assert rests == [0.25] * 7  # twenty names, three at a time


def test_a_young_folder_is_listed_again(small):
    now = time.time_ns()
    os.utime(small.folder, ns=(now + 10 * SETTLED_NS, now + 10 * SETTLED_NS))
    assert not small.refresh() and small._listed is None
