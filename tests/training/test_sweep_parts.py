"""Parts of a sweep: which candidates there are, who is dropped, how runs are packed."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fastprompt import PTuning
from fastprompt.errors import ArgumentError, TrainingError
from fastprompt.training import Job, Range
from fastprompt.training.stopping import JobState
from fastprompt.training.sweep import packing
from fastprompt.training.sweep.candidates import Candidate, expand
from fastprompt.training.sweep.halving import Halving, Ranking
from fastprompt.training.sweep.plot import plot
from fastprompt.training.sweep.seeds import over_seeds
from fastprompt.training.sweep.space import combinations
from fastprompt.training.template import Template


def state(name, best, step):
    return JobState(name, "f1", best, step, history=[{"step": step, "scores": {"f1": best}}])


# candidates --------------------------------------------------------------------------------------------------------


def test_a_range_ends_where_it_says():
    assert Range(0, 1, points=3).values() == [0, 0.5, 1]
    assert Range(1e-3, 10, log=True, points=5).values() == pytest.approx([1e-3, 1e-2, 0.1, 1, 10], rel=1e-5)
    assert Range(1, 4, points=9, integer=True).values() == [1, 2, 3, 4]


@given(st.floats(1e-6, 1e3), st.floats(1.01, 1e3), st.floats(0, 1), st.booleans())
def test_a_range_stays_within_its_ends(low, factor, share, log):
    value = Range(low, low * factor, log=log).at(share)
    assert low * (1 - 1e-5) <= value <= low * factor * (1 + 1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [((1, 1), "low < high"), ((0, 1, True), "above 0"), ((0, 1, False, 1), "at least 2")],
)
def test_wrong_ranges_are_refused(values, message):
    with pytest.raises(ArgumentError, match=message):
        Range(*values)


def test_a_grid_has_all_combinations_and_random_search_so_many():
    space = {"a": [1, 2], "b": Range(0, 1, points=2)}
    assert [tuple(c.values()) for c in combinations(space)] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    drawn = list(combinations({"a": [1, 2], "b": Range(1e-3, 1, log=True)}, search="random", candidates=50, seed=4))
    assert drawn == list(
        combinations({"a": [1, 2], "b": Range(1e-3, 1, log=True)}, search="random", candidates=50, seed=4)
    )
    assert len(drawn) == 50 and {c["a"] for c in drawn} == {1, 2}
    below = sum(c["b"] < math.sqrt(1e-3) for c in drawn)
    assert 10 < below < 40  # half of the numbers lie below the geometric mean


def test_values_without_a_place_are_left_out_and_equal_candidates_are_one(job):
    space = {
        "method": ["prompt_tuning", "p_tuning_v2"],
        "num_virtual_tokens": [2, 3],
        "layers": [None, (-1,)],
        "steps": [5],
    }
    found = expand([job], space)
    assert [c.name for c in found] == [f"capital-{i}" for i in range(6)]
    assert [c.job.config.method for c in found] == ["prompt_tuning"] * 2 + ["p_tuning_v2"] * 4
    assert "layers" not in found[0].values and found[-1].job.config.layers == (-1,)
    assert {(c.job.steps, c.job.epochs, c.base) for c in found} == {(5, None, "capital")}


@pytest.mark.parametrize("key", ["metric", "task", "init_from"])
def test_what_makes_scores_or_tokens_of_another_kind_is_not_swept(job, key):
    with pytest.raises(TrainingError, match=key):
        expand([job], {key: ["a", "b"]})


def test_every_impossible_combination_is_named(job):
    with pytest.raises(TrainingError) as caught:
        expand([job], {"num_virtual_tokens": [2, 0], "init": ["random", "texts"]})
    assert len(caught.value.problems) == 3  # all but the one that is possible
    with pytest.raises(TrainingError, match="space has"):
        expand([job], {"lerning_rate": [1]})


def test_a_template_is_for_candidates_whose_tokens_stand_in_place(job):
    placed = PTuning(num_virtual_tokens=3, in_place=True)
    given = Job(**{**vars(job), "config": placed, "template": Template("{1} {text} {2}")})
    found = expand([given], {"method": ["prompt_tuning", "p_tuning"]})
    assert [c.job.template is None for c in found] == [True, False]


def result(name, score, stopped="finished", **values):
    return {
        "name": name, "base": "a", "values": values, "method": "p_tuning", "metric": "f1", "trained_parameters": 10,
        "best_score": score, "stopped": stopped,
    }  # fmt: skip


def test_seeds_are_grouped_by_everything_else():
    assert over_seeds([result("x", 1.0, layers=[-1])]) == []
    one, two = over_seeds(
        [
            result("a", 0.25, layers=[-1], seed=0),
            result("b", 0.5, layers=None, seed=0),
            result("c", 0.75, layers=[-1], seed=4, stopped="pruned"),
            result("d", None, layers=None, seed=4, stopped="diverged"),
        ]
    )
    assert (one["candidates"], one["seeds"], one["pruned"]) == (["a", "c"], [0, 4], 1)
    assert (one["mean"], one["spread"]) == (0.5, pytest.approx(math.sqrt(0.125)))
    assert (two["values"], two["scored"], two["mean"], two["spread"]) == ({"layers": None}, 1, 0.5, None)


def test_the_plot_has_a_bar_for_settings_of_several_seeds(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.errorbar", lambda panel, *points, **style: drawn.append((points, style)))
    results = [result(str(seed), seed / 4, seed=seed) for seed in range(3)] + [result("alone", 0.5, layers=1, seed=0)]
    plot(results, tmp_path / "sweep.svg")
    (((trained, means), style),) = drawn
    assert (trained, means, style["yerr"]) == ([10], [0.25], [0.25])


def test_the_command_shows_means_over_seeds(capsys, monkeypatch):
    results = [result(f"r{i}{seed}", i + seed / 4, layers=i, seed=seed) for i in (0, 1) for seed in (0, 1)]
    results = [line | {"steps": 3} for line in results]
    command = importlib.import_module("fastprompt.cli.sweep")  # the package has the command under this name
    monkeypatch.setattr(command, "console", Console(width=120))
    command._render({"best": {"a": results[-1]}, "results": results, "seeds": over_seeds(results), "output": "out"})
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown[shown.index("f1 over seeds") :].splitlines()]
    assert ["1.125", "0.18", "2", "10", "layers=1"] in rows
    assert rows.index(next(r for r in rows if r[:1] == ["1.125"])) < rows.index(
        next(r for r in rows if r[:1] == ["0.125"])
    )


# halving -----------------------------------------------------------------------------------------------------------


@given(st.integers(2, 5), st.integers(0, 4), st.integers(1, 10_000))
def test_rungs_are_powers_apart_and_within_the_steps(eta, rungs, total):
    halving = Halving(eta, rungs)
    if total < eta**rungs:
        with pytest.raises(ArgumentError, match="fewer rungs"):
            halving.steps(total)
        return
    steps = halving.steps(total)
    assert len(steps) == rungs and all(0 < step < total for step in steps)
    assert all(b == a * eta for a, b in itertools.pairwise(steps))
    assert all(step % steps[0] == 0 for step in steps)


def ranking(job, count, **halving):
    candidates = [Candidate(Job(**{**vars(job), "name": f"c{i}", "steps": 9}), "base", {}) for i in range(count)]
    return Ranking.of(Halving(**halving), candidates)


def test_one_in_eta_goes_on_at_each_rung(job):
    rank = ranking(job, 7, eta=3, rungs=2)
    states = {f"c{i}": state(f"c{i}", i / 10, 1) for i in range(7)}
    assert set(rank(1, states)) == {"c0", "c1", "c2", "c3"}  # ceil(7 / 3) go on
    later = {name: state(name, s.best_score, 3) for name, s in states.items() if name in ("c4", "c5", "c6")}
    assert set(rank(3, later)) == {"c4", "c5"}
    assert list(rank(6, {"c6": state("c6", 0.9, 6)})) == []  # no rung


def test_a_later_run_is_ranked_among_earlier_ones(job):
    rank = ranking(job, 6, eta=3, rungs=1)
    assert set(rank(3, {n: state(n, v, 3) for n, v in (("c0", 0.9), ("c1", 0.8), ("c2", 0.1))})) == {"c1", "c2"}
    losers = rank(3, {n: state(n, v, 3) for n, v in (("c3", 0.7), ("c4", 0.85), ("c5", 0.2))})
    assert set(losers) == {"c3", "c5"}  # ceil(6 / 3) of all six: c0 and c4


def test_ties_go_to_the_first_and_no_number_goes_out(job):
    rank = ranking(job, 3, eta=3, rungs=1)
    assert set(rank(3, {n: state(n, v, 3) for n, v in (("c2", 0.5), ("c1", 0.5), ("c0", None))})) == {"c0", "c2"}


# packing -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**9), st.integers(1, 10**7), st.integers(1, 10**10), st.integers(1, 500))
def test_what_fits_stays_within_the_allowed_bytes(rest, each, allowed, most):
    peaks = [(n, rest + n * each) for n in (1, 2, 4)]
    fits = packing.capacity(peaks, allowed, most)
    assert 1 <= fits <= most
    assert fits == 1 or rest + fits * each <= allowed
    assert fits == most or rest + (fits + 1) * each > allowed


def test_the_line_lies_above_every_measurement():
    assert packing.capacity([(1, 100), (2, 180), (4, 220)], 420, 100) == 8  # slope 40 from 100 at 2, not from 60
    assert packing.capacity([(1, 50), (2, 40)], 60, 9) == 9
    assert packing.capacity([(1, 50)], 40, 9) == 1


@given(st.integers(1, 40), st.integers(1, 12))
def test_packs_hold_everybody_once(count, size):
    made = packing.packs([_Stub(i % 3) for i in range(count)], size)
    assert sum(map(len, made)) == count and max(map(len, made)) <= size
    assert len(made) == -(-count // size) and max(map(len, made)) - min(map(len, made)) <= 1


class _Stub:
    """A candidate as far as packing looks."""

    def __init__(self, steps):
        self.job = self
        self.steps = steps

    def total_steps(self):
        return self.steps


def test_memory_is_measured_and_leaves_the_model_as_it_was(model, job):
    found = expand([job], {"num_virtual_tokens": [1, 2, 3, 4, 5]})
    room = packing.measure(model, found, None, {})
    assert [size for size, _ in room.peaks] == [1, 2, 4]
    assert all(peak > 2**20 for _, peak in room.peaks) and room.allowed > room.peaks[0][1]
    assert 1 <= room.fits <= 5 and model.prompt_names == []
    assert packing.measure(model, found, 1, {}).fits == 1
    assert [size for size, _ in packing.measure(model, found[:2], None, {}).peaks] == [1, 2]
