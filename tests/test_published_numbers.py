"""Measured numbers in README and docs/ are those of bench/results."""

import re

import pytest
import torch

from bench.checkout import ROOT
from bench.pages.command import TABLES, VALUES, differences, marks, pages, written
from bench.pages.results import record

PAGES = pages()
# Tables with decimals that nobody measured: (page, first header cell) -> what they are
NOT_MEASURED = {
    ("README.md", "architectures"): "names",
    ("README.md", "file"): "names of models, in recipes",
    ("prompts.md", "config"): "numbers of papers",
    ("prompts.md", "`init`"): "definitions",
    ("config-files.md", "key"): "defaults",
    ("demo.md", "what"): "fastprompt/demo/assets/record.json, which tests/test_docs.py compares",
    ("benchmarks.md", "case"): "targets",
    ("gpu-check.md", "case (bf16)"): "targets",
    ("concepts.md", ""): "definitions",
    ("cuda.md", "case"): "counted from bytes, as the page says",
    ("vllm.md", ""): "versions",
    ("environment.md", "variable"): "values",
    ("ops.md", "argument"): "defaults",
    ("serving.md", "option"): "defaults",
    ("numerics.md", ""): "tolerances",
    ("testing.md", "tests"): "tolerances and versions",
}
DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")


def outside_of_fences(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def tables(text):
    """(the line before, header, rows) of every table."""
    found = re.finditer(r"((?:[^\n]*\n){0,2})((?:^\|.*\|\n)+)", outside_of_fences(text), re.MULTILINE)
    return [(before, *rows.splitlines()[:1], rows.splitlines()[2:]) for before, rows in (m.groups() for m in found)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_say_what_the_results_say(page):
    assert differences(page.read_text()) == [], "python -m bench pages --write"


def test_what_can_be_made_is_on_a_page():
    assert set().union(*(marks(page.read_text()) for page in PAGES)) == {*TABLES, *VALUES}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_marks_are_well_formed(page):
    text = outside_of_fences(page.read_text())
    found = re.findall(r"<!-- results?: (\S+) -->", text)
    assert len(found) == len(re.findall(r"<!-- results: \S+ -->\n\n\|", text)) + text.count("<!-- -->")
    assert set(found) == marks(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tables_with_decimals_come_from_results(page):
    for before, header, rows in tables(page.read_text()):
        first = header.strip("|").split("|")[0].strip()
        if "<!-- results: " not in before and (page.name, first) not in NOT_MEASURED:
            assert not any(DECIMAL.search(row) for row in rows), header


def test_decimals_in_the_main_page_are_marked_or_versions():
    text = outside_of_fences((PAGES[0]).read_text())
    text = re.sub(r"^\|.*$|<!-- result: .*?<!-- -->|`[^`]*`|\[[^\]]*\]\([^)]*\)", "", text, flags=re.MULTILINE)
    versions = r"(?:Python|torch|transformers|PEFT|Before|Apache|to) \d+\.\d+"
    assert DECIMAL.findall(re.sub(versions, "", text)) == []


def test_errors_of_exponentials_are_those_of_their_polynomials():
    """`docs/cpu.md` says how far `exp2` of `csrc/cpu/vec.h` is off on [-1/2, 1/2]."""
    body = (ROOT / "csrc" / "cpu" / "vec.h").read_text().partition("kDegree == 6")[2]
    found = [float(x) for x in re.findall(r"(?<=[(\s])(\d\.\d+)f", body.partition("#if")[0])]
    coefficients = torch.tensor(found).double().split([7, 5])
    x = torch.linspace(-0.5, 0.5, 10_001, dtype=torch.float64)
    for own in coefficients:
        value = sum(c * x**power for power, c in enumerate(reversed(own)))
        assert f"{(value / x.exp2() - 1).abs().max():.1e}" in (ROOT / "docs" / "cpu.md").read_text()


def test_a_number_that_is_wrong_is_found_and_put_right():
    page = "gave <!-- result: load.over-peft -->1.0<!-- --> times\n\n<!-- results: serving-load -->\n\n| a |\n|---|\n"
    assert [name for name, *_ in differences(page)] == ["serving-load", "load.over-peft"]
    assert differences(written(page)) == [] and "<!-- -->" in written(page)


def test_a_number_of_no_line_is_an_error():
    with pytest.raises(LookupError, match="0 lines"):
        record("main-job-cpu.jsonl", kind="ratio", case="no such case")


def test_what_the_main_page_shows_was_checked_and_quiet():
    """Its results were green, and nobody else ran."""
    from bench.pages import speed
    from bench.pages.results import records

    assert all(r["green"] for r in records(speed.MAIN_JOB, kind="check"))
    assert all(r["quiet"] for r in records(speed.MAIN_JOB, kind="ratio"))
    cases = [record(speed.ATTENTION, kind="case", case=case, dtype="fp32") for case in speed._OP_CASES.values()]
    assert all(r["quiet"] for case in cases for r in case["ratios"] if r["over"] in speed._WAYS.values())
