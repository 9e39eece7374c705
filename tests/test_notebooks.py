"""The notebooks run, what they claim holds (their cells assert it), and what is stored in them is clean."""

import json
import re

import nbformat
import pytest
from doc_pages import NOTEBOOKS
from notebook_tools import METADATA, executed, read

EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
FIELDS = {"code": {"cell_type", "execution_count", "id", "metadata", "outputs", "source"}}
FIELDS["markdown"] = {"cell_type", "id", "metadata", "source"}


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == ["drop-in", "microbenchmarks", "retrieval", "train-ten-tasks"]


@EACH
def test_runs_offline_in_a_fresh_kernel(path):
    """Says as much as what is stored: the same kinds of output from the same cells, without errors."""
    stored = read(path)
    fresh = executed(stored)
    for cell, old in zip(code(fresh), code(stored), strict=True):
        said = [output for output in cell.outputs if output.get("name") != "stderr"]
        assert [output.output_type for output in said] == [output.output_type for output in old.outputs], cell.source


@EACH
def test_claims_are_asserted(path):
    assert sum(bool(re.search(r"^ *assert ", cell.source, re.MULTILINE)) for cell in code(read(path))) >= 2


@EACH
def test_is_stored_as_it_ran_once_from_top_to_bottom(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert len(outputs) >= 3
    assert {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")


@EACH
def test_nothing_of_a_machine_is_stored(path):
    notebook = read(path)
    assert notebook.metadata == METADATA
    assert all(set(cell) == FIELDS[cell.cell_type] and not cell.metadata for cell in notebook.cells)
    said = json.dumps([output for cell in code(notebook) for output in cell.outputs])
    without_pictures = re.sub(r'"image/png": "[^"]*"', "", said)
    assert not re.search(r"(?<![\w.])/[a-z]\w*/|[A-Z]:\\\\|\bfile:", without_pictures)
    assert path.stat().st_size < 200_000


@EACH
def test_explains_and_is_short(path):
    notebook = read(path)
    first, *_ = notebook.cells
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert sum(cell.cell_type == "markdown" for cell in notebook.cells) >= len(code(notebook)) // 2
    for cell in code(notebook):
        assert len(cell.source.splitlines()) <= 45, cell.source
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            assert cell.source.startswith("# "), "a cell that draws says in its first line what the picture shows"
