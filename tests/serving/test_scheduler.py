"""Prompts share the engine fairly, and memory that is short costs time and no answer."""

import random
from collections import Counter

import pytest
from scheduler_cases import make_row, make_scheduler, run_all, run_step

from fastprompt.errors import PromptNotFoundError
from fastprompt.serving.scheduler import Admission


def test_decoding_comes_first_and_texts_are_cut_at_the_budget():
    scheduler = make_scheduler(max_batch_tokens=10)
    scheduler.add(make_row("a", text=3))
    run_step(scheduler)
    scheduler.add(make_row("b", text=25))
    found = [[(p.row.prompt, p.count, p.complete) for p in run_step(scheduler)] for _ in range(4)]
    assert found[0] == [("a", 1, True), ("b", 9, False)]
    assert found[1] == [("a", 1, True), ("b", 9, False)]
    assert found[2] == [("a", 1, True), ("b", 7, True)]
    assert found[3] == [("a", 1, True), ("b", 1, True)] or found[3] == [("b", 1, True), ("a", 1, True)]


def test_the_least_served_prompt_is_admitted_first():
    scheduler = make_scheduler(max_rows=4)
    for _ in range(20):
        scheduler.add(make_row("flood", new=5))
    run_step(scheduler)
    scheduler.add(make_row("late", new=5))
    order = []
    while scheduler.waiting or scheduler.running:
        order += [p.row.prompt for p in run_step(scheduler) if p.row.generated == 1]
    assert "late" in order[:5]  # right behind the rows that had started


def test_a_flood_of_long_rows_gives_a_newcomer_a_place():
    scheduler = make_scheduler(max_rows=4, quantum=8)
    for _ in range(50):
        scheduler.add(make_row("flood", new=500))
    for _ in range(20):
        run_step(scheduler)
    late = make_row("late", new=3)
    scheduler.add(late)
    waited = next(i for i in range(100) if any(p.row is late for p in run_step(scheduler)))
    assert waited <= 1 and scheduler.preemptions == 1
    run_step(scheduler)
    run_step(scheduler)
    assert late.generated == 3 and late not in scheduler.running


def test_prompts_with_rows_to_spare_keep_their_share():
    scheduler = make_scheduler(max_rows=4, quantum=1)
    for prompt in "aabb":
        scheduler.add(make_row(prompt))
    for _ in range(5):
        run_step(scheduler)
    for prompt in "cd":
        scheduler.add(make_row(prompt))
    run_step(scheduler)
    assert scheduler.running_by_prompt() == Counter("abcd")


def test_tokens_are_shared_evenly_between_busy_prompts():
    scheduler = make_scheduler(max_rows=8, max_batch_tokens=64)
    ran = Counter()
    for prompt, rows in (("many", 200), ("few", 8)):
        for _ in range(rows):
            scheduler.add(make_row(prompt, text=8, new=8))
    for _ in range(16):
        for piece in run_step(scheduler):
            ran[piece.row.prompt] += piece.count
    assert 0.8 < ran["few"] / ran["many"] < 1.25


def test_coming_and_going_earns_nothing():
    scheduler = make_scheduler(max_rows=1)
    for _ in range(3):
        scheduler.add(make_row("steady", new=4))
    run_step(scheduler)
    for _ in range(3):  # a prompt that was idle is not owed the time it was away
        scheduler.add(make_row("new", new=4))
    order = []
    while scheduler.waiting or scheduler.running:
        order += [p.row.prompt for p in run_step(scheduler) if p.row.generated == 1]
    assert order == ["new", "steady", "new", "steady", "new"]


def test_prompts_on_their_way_do_not_hold_up_others():
    there = set()
    scheduler = make_scheduler(
        admit=lambda row: Admission.READY if row.prompt in there else Admission.LATER, max_rows=2
    )
    slow, quick = make_row("slow", new=1), make_row("quick", new=1)
    scheduler.add(slow)
    scheduler.add(quick)
    there.add("quick")
    assert [p.row for p in run_step(scheduler)] == [quick]
    assert run_step(scheduler) == []
    there.add("slow")
    assert [p.row for p in run_step(scheduler)] == [slow]


def test_a_prompt_that_cannot_be_had_fails_its_row_alone():
    def admit(row):
        if row.prompt == "lost":
            raise PromptNotFoundError("lost")
        return Admission.READY

    scheduler = make_scheduler(admit=admit)
    rows = [make_row("lost"), make_row("a"), make_row("lost")]
    for row in rows:
        scheduler.add(row)
    assert [p.row for p in run_step(scheduler)] == [rows[1]]
    assert [row for row, _ in scheduler.failed] == [rows[0], rows[2]]


@pytest.mark.parametrize("seed", range(15))
def test_random_traffic_ends_and_frees_everything(seed):
    rng = random.Random(seed)
    scheduler = make_scheduler(
        blocks=rng.randint(12, 40),
        max_rows=rng.randint(1, 9),
        max_batch_tokens=rng.randint(9, 60),
        quantum=rng.randint(1, 9),
        share_blocks=bool(seed % 3),
    )
    rows = []
    for _ in range(150):
        if rng.random() < 0.4:
            rows.append(make_row(rng.choice("abcde"), text=rng.randint(1, 20), new=rng.randint(1, 25)))
            scheduler.add(rows[-1])
        pieces = run_step(scheduler)
        assert sum(p.count for p in pieces) <= scheduler.rules.max_batch_tokens
        assert len({p.row for p in pieces}) == len(pieces) <= scheduler.rules.max_rows
        for piece in pieces:
            assert len(piece.row.blocks) * 4 >= piece.row.computed or piece.row not in scheduler.running
        if rows and rng.random() < 0.1:
            scheduler.remove(rng.choice(rows))
    run_all(scheduler)
    assert scheduler.pool.free == scheduler.pool.count


class _OnePrompt:
    """A device that holds one prompt at a time."""

    def __init__(self):
        self.prompt, self.leases = None, 0

    def admit(self, row):
        if row.lease is None and self.prompt not in (None, row.prompt):
            return Admission.CROWDED
        if row.lease is None:
            self.prompt, row.lease = row.prompt, self
            self.leases += 1
        return Admission.READY

    def release(self):
        self.leases -= 1
        self.prompt = self.prompt if self.leases else None


def test_rows_that_hold_what_all_others_wait_for_go_on():
    scheduler = make_scheduler(admit=_OnePrompt().admit, max_rows=2, quantum=8)
    for _ in range(6):
        scheduler.add(make_row("flood", new=30))
    for _ in range(20):
        run_step(scheduler)
    for i in range(12):  # more than are looked at in a step, and all less served than the flood
        scheduler.add(make_row(f"late{i}", new=3))
    run_all(scheduler)
    assert scheduler.preemptions and scheduler.pool.free == scheduler.pool.count
