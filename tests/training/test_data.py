"""Examples from every kind of source, parts of them, and what is said where there are none."""

import json
import sys

import datasets
import pytest

from fastprompt.errors import ArgumentError
from fastprompt.training import data

ROWS = [{"text": f"text {i}", "label": "yes" if i % 3 else "no"} for i in range(10)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def written(folder, name):
    path = folder / name
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    elif path.suffix in (".csv", ".tsv"):
        separator = "," if path.suffix == ".csv" else "\t"
        path.write_text("\n".join([separator.join(ROWS[0]), *(separator.join(row.values()) for row in ROWS)]) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"])
@pytest.mark.parametrize("kind", [str, lambda path: path, lambda path: [path]])
def test_files_of_every_format(tmp_path, name, kind):
    assert data.load(kind(written(tmp_path, name))).to_list() == ROWS


def test_several_files_are_read_in_order(tmp_path):
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    first.write_text('{"text": "a"}\n')
    second.write_text('{"text": "b"}\n')
    assert data.load(str(tmp_path / "*.jsonl"))["text"] == ["a", "b"]
    assert data.load([second, first])["text"] == ["b", "a"]


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "old"}\n')
    assert data.load(path)["text"] == ["old"]
    path.write_text('{"text": "newer"}\n{"text": "newest"}\n')
    assert data.load(path)["text"] == ["newer", "newest"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (None, range(10)),
        ("train", range(10)),
        ("train[:3]", range(3)),
        ("train[-2:]", range(8, 10)),
        ("train[20%:50%]", range(2, 5)),
        ("train[:2]+train[5:6]", [0, 1, 5]),
        ("[:4]", range(4)),
        ("validation[:1]", range(1)),
    ],
)
@pytest.mark.parametrize("memory", [True, False])
def test_parts_of_a_source_without_splits(tmp_path, split, expected, memory):
    source = ROWS if memory else written(tmp_path, "a.jsonl")
    assert data.load(source, split=split).to_list() == [ROWS[i] for i in expected]


def test_splits_of_a_dictionary():
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:2]))
    assert len(data.load(both, split="test")) == 2
    assert len(data.load(both, split="train[:30%]")) == 3
    for wrong in (None, "validation", "train+test"):
        with pytest.raises(ArgumentError, match=r"expected one of 'train', 'test'"):
            data.load(both, split=wrong)


def test_a_saved_folder(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(dev=datasets.Dataset.from_list(ROWS[:4])).save_to_disk(str(tmp_path / "several"))
    assert len(data.load(tmp_path / "one", split="train[:5]")) == 5
    assert len(data.load(str(tmp_path / "several"))) == 4


def test_columns_get_other_names():
    renamed = data.load([{"sentence": "a", "text": "old", "y": 1}], columns={"sentence": "text", "y": "label"})
    assert renamed.to_list() == [{"text": "a", "label": 1}]
    swapped = data.load([{"a": 1, "b": 2}], columns={"a": "b", "b": "a"})
    assert swapped.to_list() == [{"b": 1, "a": 2}]


def test_limit_takes_the_first():
    assert data.load(ROWS, limit=3).to_list() == ROWS[:3]
    assert len(data.load(ROWS, limit=99)) == 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(source="missing.jsonl"), r"source is 'missing.jsonl', and there is no such file"),
        (dict(source="missing/*.csv"), "no such file"),
        (dict(source=["missing.csv"]), "no such file"),
        (dict(source="nobody/nothing"), r"'nobody/nothing', which is no file or folder here, and the hub"),
        (dict(source=3), "source is int, expected"),
        (dict(source=[1, 2]), "source is list, expected"),
        (dict(source=["a.csv", "b.jsonl"]), "expected files of one format"),
        (dict(source=["a.txt"]), "expected files of one format, any of .jsonl"),
        (dict(source=[{"a": 1}, {"a": "x"}]), "do not agree"),
        (dict(source=ROWS, split="train[a]"), r"split is 'train\[a\]', expected"),
        (dict(source=ROWS, split="train[:99%"), "split is"),
        (dict(source=ROWS, columns={"nothing": "text"}), r"columns has 'nothing', expected one of 'text', 'label'"),
        (dict(source=ROWS, columns={"text": "x", "label": "x"}), "at most once"),
        (dict(source=ROWS, limit=0), "limit is 0"),
    ],
)
def test_what_cannot_be_loaded_is_an_error(arguments, said):
    with pytest.raises(ArgumentError, match=said):
        data.load(**arguments)


def test_a_broken_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"a": 1}\n{"a":\n')
    with pytest.raises(ArgumentError, match=r"broken.jsonl.*cannot be read: JSON parse error"):
        data.load(path)


def test_an_empty_file_gives_an_empty_data_set(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert len(data.load(tmp_path / "empty.jsonl")) == 0
    assert len(data.load([])) == 0


def test_class_names():
    assert data.class_names(data.load(ROWS)) == ("no", "yes")
    assert data.class_names(data.load([{"label": 10}, {"label": 2}])) == ("2", "10")
    assert data.class_names(data.load([{"tags": ["O", "B-x"]}, {"tags": []}]), "tags") == ("B-x", "O")
    named = datasets.Features({"label": datasets.ClassLabel(names=["neg", "pos"])})
    assert data.class_names(datasets.Dataset.from_dict({"label": [1]}, features=named)) == ("neg", "pos")
    listed = datasets.Features({"tags": datasets.List(datasets.ClassLabel(names=["O", "B-x"]))})
    assert data.class_names(datasets.Dataset.from_dict({"tags": [[1]]}, features=listed), "tags") == ("O", "B-x")
    for rows, said in (([{"x": 1}], "column 'label' is missing"), ([{"label": 0.5}], "name no class")):
        with pytest.raises(ArgumentError, match=said):
            data.class_names(data.load(rows))


def test_without_its_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ArgumentError, match=r"needs datasets, .*: pip install 'fastprompt\[train\]'"):
        data.load(ROWS)
