"""Memory that is short costs little time and no answer, and is shared as fairly as places are."""

import random

import pytest
from scheduler_cases import make_row, make_scheduler, run_all, run_step

from fastprompt.serving.forecast import Forecast


def _rows(count, text, new, most, prompts=8, seed=0):
    """Rows of random texts, and at how many tokens each ends; `most` may be asked for."""
    rng, ends = random.Random(seed), {}
    for i in range(count):
        ids = [rng.randrange(1000) for _ in range(rng.randint(*text))]
        length = rng.randint(*new)
        ends[make_row(f"p{i % prompts}", new=most or length, ids=ids)] = length
    return ends


@pytest.mark.parametrize("share_blocks", [True, False])
@pytest.mark.parametrize(
    ("blocks", "rows", "most"),
    [
        (24, ((32, 32), (32, 32), None), 1.15),  # 1.43 when rows were admitted by their text alone
        (48, ((8, 64), (8, 96), None), 1.2),  # 1.58
        (48, ((8, 64), (8, 96), 512), 1.3),  # 1.58: nobody knows that they end early
        (48, ((8, 32), (4, 200), 700), 1.6),  # 1.92
    ],
    ids=["alike", "known", "early", "spread"],
)
def test_little_is_computed_twice(blocks, rows, most, share_blocks):
    """Memory for about five rows, of which 32 may run: computed tokens against those of rows that never give way."""
    ends = _rows(128, *rows)
    scheduler = make_scheduler(blocks, size=16, max_rows=32, share_blocks=share_blocks)
    for row in ends:
        scheduler.add(row)
    _, computed = run_all(scheduler, ends=ends)
    needed = sum(row.text_length + length - 1 for row, length in ends.items())
    assert computed <= most * needed and scheduler.pool.free == blocks
    assert all(row.generated == length for row, length in ends.items())


def test_rows_that_outgrow_their_forecast_give_way_and_all_end(monkeypatch):
    monkeypatch.setattr(Forecast, "fits", lambda self, rows: True)
    scheduler = make_scheduler(blocks=10, max_rows=8)
    rows = [make_row(f"p{i}", text=6, new=12) for i in range(8)]
    for row in rows:
        scheduler.add(row)
    run_all(scheduler)
    assert scheduler.preemptions and all(row.generated == 12 for row in rows)
    assert scheduler.pool.free == 10


def test_what_is_not_wise_to_admit_keeps_what_the_pool_knows():
    scheduler = make_scheduler(blocks=8, max_rows=4)
    scheduler.add(make_row("a", text=9, new=1))
    run_all(scheduler)
    scheduler.add(make_row("b", ids=[1] * 12, new=12))
    run_step(scheduler)
    scheduler.add(make_row("a", text=9, new=12))  # it would fit now, and not for long
    for _ in range(5):
        assert len(run_step(scheduler)) == 1
    assert scheduler.pool.hit_tokens == 0
    run_all(scheduler)
    assert scheduler.pool.hit_tokens == 8 and scheduler.preemptions == 0


def test_a_flood_that_fills_the_memory_makes_room_for_a_newcomer():
    scheduler = make_scheduler(blocks=40, max_rows=32, quantum=8)
    for i in range(50):
        scheduler.add(make_row("flood", ids=[i] * 8, new=24))
    for _ in range(10):
        run_step(scheduler)
    assert 3 <= len(scheduler.running) < 10  # memory is full, places are not
    late = make_row("late", new=3)
    scheduler.add(late)
    assert next(i for i in range(100) if any(p.row is late for p in run_step(scheduler))) <= 2
    run_all(scheduler)


def test_prompts_with_one_row_each_leave_each_other_alone():
    """With fewer places in memory than prompts, nobody gives way to anybody: that would be work for nothing."""
    scheduler = make_scheduler(blocks=40, max_rows=32, quantum=1)
    for i in range(30):
        scheduler.add(make_row(f"p{i}", ids=[i] * 8, new=24))
    run_all(scheduler)
    assert scheduler.preemptions == 0


def test_a_row_that_was_cancelled_while_it_waited_for_memory():
    scheduler = make_scheduler(blocks=4, max_rows=4)
    first, second, third = (make_row(p, text=8, new=4) for p in "abc")
    for row in (first, second, third):
        scheduler.add(row)
    run_step(scheduler)
    run_step(scheduler)
    scheduler.remove(second)
    run_all(scheduler)
    assert (first.generated, second.generated, third.generated) == (4, 0, 4)
    assert scheduler.pool.free == 4


def test_a_forecast_learns_prompt_by_prompt():
    scheduler = make_scheduler(blocks=100)
    forecast = Forecast(scheduler.pool)
    fresh = make_row("a", new=50)
    assert forecast.left(fresh) == 50  # nothing is known: all that it may get
    ended = make_row("a", new=50)
    ended.tokens += [7] * 10
    forecast.ended(ended)
    assert forecast.left(fresh) == 10 and forecast.left(make_row("b", new=50)) == 10
    longer = make_row("b", new=50)
    longer.tokens += [7] * 30
    forecast.ended(longer)
    assert forecast.left(fresh) == 10 and forecast.left(make_row("b", new=50)) == 30
    assert 10 < forecast.left(make_row("c", new=50)) < 30
    fresh.tokens += [7] * 20
    assert forecast.left(fresh) == 4  # it is longer than expected: another block
    assert forecast.left(make_row("b", new=5)) == 5
    forecast.ended(make_row("a"))  # cancelled before its first token
    assert forecast.left(make_row("a", new=50)) == 10


def test_a_forecast_counts_shared_blocks_once():
    scheduler = make_scheduler(blocks=20, max_rows=8)
    text = list(range(40))  # ten blocks
    scheduler.add(make_row("a", ids=text, new=1))
    run_all(scheduler)
    for _ in range(4):
        scheduler.add(make_row("a", ids=[*text, 1], new=4))
    run_step(scheduler)
    assert len(scheduler.running) == 4
    run_all(scheduler)
    assert scheduler.preemptions == 0


def test_what_did_not_fit_was_not_found():
    scheduler = make_scheduler(blocks=3, max_rows=2)
    scheduler.add(make_row("a", text=9, new=2))
    run_step(scheduler)
    scheduler.add(make_row("a", text=12, new=1))
    asked = scheduler.pool.asked_tokens
    assert len(run_step(scheduler)) == 1 and scheduler.pool.asked_tokens == asked and scheduler.pool.hit_tokens == 0
    run_all(scheduler)
    assert scheduler.pool.hit_tokens == 8
