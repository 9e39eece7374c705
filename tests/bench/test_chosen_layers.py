"""The benchmark of chosen layers runs, checks its gradients, and writes down what it saw."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import chosen_layers


def test_a_quick_run(quick: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = quick("chosen-layers", "--rounds", "2")
    assert status == 0 and "top quarter / all layers" in capsys.readouterr().out
    (ratio,) = [line for line in lines if line["kind"] == "ratio"]
    assert ratio["met"] is None and ratio["wall"]["median"] > 0
    assert {line["name"] for line in lines if line["kind"] == "memory"} == {"all layers", "top quarter"}


def test_no_ratio_where_gradients_differ(quick: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    original = chosen_layers._gradient
    monkeypatch.setattr(chosen_layers, "_gradient", lambda *args: 1.01 * original(*args))
    status, lines = quick("chosen-layers", "--rounds", "2")
    assert status == 1 and not [line for line in lines if line["kind"] == "ratio"]
