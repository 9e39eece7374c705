"""The documentation is true: its Python runs, and what it names exists."""

import inspect
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import zoo
from doc_pages import NOTEBOOKS, PAGES, ROOT, blocks, languages, prose, shell_lines, table

from fastprompt import PromptedModel, env, prompt_format
from fastprompt.demo import ASSETS, tasks

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SETUP = (ROOT / "setup.py").read_text()


def anchor(heading: str) -> str:
    """The id that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for line, text in blocks(page, "python"):
        exec(compile("\n" * line + text, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_are_of_languages_that_tests_look_at(page):
    """Python runs, shell lines are parsed (test_docs_shell.py), TOML is read; others are no code."""
    assert languages(page) <= {"python", "sh", "toml", "text", ""}
    for _, text in blocks(page, "toml"):
        tomllib.loads(text)


def test_the_main_page_has_a_quickstart_of_ten_lines():
    _, first = blocks(ROOT / "README.md", "python")[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda p: p.name)
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, part = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT) and file.exists(), target
        if part:
            headings = re.findall(r"^#+ (.+)$", prose(file), re.MULTILINE)
            assert part in [anchor(h) for h in headings], target


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda p: p.name)
def test_paths_in_code_marks_exist(page):
    for path in re.findall(r"`((?:fastprompt|tests|bench|docs|csrc|kernels|requirements)/[\w./-]*)`", prose(page)):
        assert (ROOT / path).exists(), path


def test_every_module_stands_in_the_module_map():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in sorted((ROOT / "fastprompt").iterdir()):
        name = f"{path.name}/" if path.is_dir() else path.name
        if not name.startswith("__") and (path.suffix == ".py" or (path / "__init__.py").exists()):
            assert f"`fastprompt/{name}`" in text, name


def test_modules_import_downwards():
    """As the module map says: from the same line of it or from lines below."""
    rows = [row[0] for row in table(ROOT / "docs" / "architecture.md", "module")]
    line = {part: i for i, row in enumerate(rows) for part in re.findall(r"fastprompt/([\w/]*\w)", row)}

    def place(parts):
        """The line of the most that the map says of a module; None where it says nothing."""
        return next((line[key] for n in (2, 1) if (key := "/".join(parts[:n])) in line), None)

    for path in (ROOT / "fastprompt").rglob("*.py"):
        here = place(path.relative_to(ROOT / "fastprompt").with_suffix("").parts)
        text = path.read_text()
        imports = [
            found.split(".") for found in re.findall(r"^(?:from|import) fastprompt\.([\w.]+)", text, re.MULTILINE)
        ]
        for names in re.findall(r"^from fastprompt import (.+)$", text, re.MULTILINE):
            imports += [[name] for name in names.split(", ") if name in line]
        if here is not None:
            assert [found for found in imports if (place(found) or 0) < here] == [], path


def test_every_environment_variable_is_documented_and_read():
    read = set(re.findall(r"\bFASTPROMPT_[A-Z_]*[A-Z]\b", inspect.getsource(env) + SETUP))
    assert {row[0] for row in table(ROOT / "docs" / "environment.md", "variable")} == read


def test_environment_variables_are_read_in_one_module():
    for path in (ROOT / "fastprompt").rglob("*.py"):
        if path != Path(env.__file__):
            assert not re.search(r"\bos\.(environ|getenv)\b", path.read_text()), path


def test_every_key_of_a_stored_prompt_is_documented():
    assert [row[0] for row in table(ROOT / "docs" / "bank-and-store.md", "key")] == list(prompt_format.FIELDS)


def test_the_table_of_what_runs_agrees_with_the_backbones():
    listed = {name: row[1:3] for row in table(ROOT / "README.md", "architectures") for name in row[0].split(", ")}
    variants = {"mistral_window": "mistral", "falcon_mqa": "falcon"}
    built = {zoo.causal: zoo.CAUSAL, zoo.seq2seq: zoo.SEQ2SEQ, zoo.encoder: zoo.ENCODERS}
    assert set(listed) == {variants.get(name, name) for names in built.values() for name in names}
    for build, names in built.items():
        for name in names:
            info = PromptedModel(build(name))._info
            path, embedding_prompts = listed[variants.get(name, name)]
            assert (info.path, info.compiles) == (path, embedding_prompts == "compiled to a prefix"), name


@pytest.fixture
def record():
    return json.loads((ASSETS / "record.json").read_text())


def test_numbers_of_the_training_record(record):
    for _, path, value in table(ROOT / "docs" / "demo.md", "what"):
        held = record
        for key in path.split("."):
            held = held[int(key) if isinstance(held, list) else key]
        assert value in (str(held), f"{held:,}" if isinstance(held, int) else None), path
    assert [[record["command"]]] == [
        [shlex.join(words)] for words in shell_lines(ROOT / "docs" / "demo.md") if words[0] == "python"
    ]


def test_scores_of_the_training_record(record):
    want = []
    for task in tasks():
        held = record["tasks"][task.name]
        scores = held["bare"], held["phrasings"][task.hand_written][1], held["three_examples"]
        want.append([task.name, *(f"{score:.0%}" for score in scores)])
    assert table(ROOT / "docs" / "demo.md", "task") == want
    skills = record["skills"].values()
    text = (ROOT / "docs" / "demo.md").read_text()
    assert f"{min(skills):.0%} to {max(skills):.0%}" in text and f"({sum(skills) / len(skills):.0%} on average" in text
