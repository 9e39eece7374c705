"""The documentation is true: its Python runs, and what it names exists."""

import inspect
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import zoo

from fastprompt import PromptedModel, env, prompt_format
from fastprompt.demo import ASSETS, tasks

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SETUP = (ROOT / "setup.py").read_text()


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Line number and text of every fenced block of a language."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start(1)), m[1]) for m in found]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchor(heading: str) -> str:
    """The id that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def table(page: Path, first: str) -> list[list[str]]:
    """The rows of the table whose first header cell is `first`."""
    lines = iter(page.read_text().splitlines())
    next(line for line in lines if line.startswith(f"| {first} |"))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


def commands(word: str) -> list[list[str]]:
    """Command lines of all pages' shell blocks that begin with a word."""
    lines = [line for page in PAGES for _, text in blocks(page, "sh") for line in text.splitlines()]
    return [parts for line in lines if (parts := shlex.split(line, comments=True)) and parts[0] == word]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for line, text in blocks(page, "python"):
        exec(compile("\n" * line + text, str(page), "exec"), names)


def test_the_main_page_has_a_quickstart_of_ten_lines():
    _, first = blocks(ROOT / "README.md", "python")[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
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
    line = {part: i for i, row in enumerate(rows) for part in re.findall(r"fastprompt/(\w+)", row)}
    for path in (ROOT / "fastprompt").rglob("*.py"):
        module = path.relative_to(ROOT / "fastprompt").parts[0].removesuffix(".py")
        text = path.read_text()
        imports = re.findall(r"^(?:from|import) fastprompt\.(\w+)", text, re.MULTILINE)
        for names in re.findall(r"^from fastprompt import (.+)$", text, re.MULTILINE):
            imports += [name for name in names.split(", ") if name in line]
        if module in line:
            assert [name for name in imports if line[name] < line[module]] == [], path


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


def test_commands_parse():
    from typer.main import get_command

    from fastprompt.cli import app

    group = get_command(app)
    found = commands("fastprompt")
    assert {parts[1] for parts in found} == set(group.commands)  # every command is shown, and only those
    for parts in found:
        group.commands[parts[1]].make_context(parts[1], parts[2:])


def test_make_targets_and_benchmarks_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {parts[1] for parts in commands("make")} <= set(targets)
    from bench.__main__ import COMMANDS

    named = {name for page in PAGES for name in re.findall(r"python -m bench ([\w-]+)", page.read_text())}
    assert named and named <= set(COMMANDS)


def test_scripts_exist():
    for page in PAGES:
        for _, text in blocks(page, "sh"):
            for script in re.findall(r"^(\.\w+/\w+)", text, re.MULTILINE):
                assert os.access(ROOT / script, os.X_OK), script


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
        [shlex.join(parts)] for parts in commands("python") if parts[2].startswith("fastprompt.demo")
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


def test_speed_table_is_the_committed_run():
    """Every ratio of README's table stands in the results, which were green and quiet."""
    lines = (ROOT / "bench" / "results" / "main-job-cpu.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert all(r["green"] for r in records if r["kind"] == "check")
    ratios = [r for r in records if r["kind"] == "ratio"]
    assert all(r["quiet"] for r in ratios)
    measured = {"{median:.3f} [{p20:.3f}, {p80:.3f}]".format(**r["wall"]) for r in ratios}
    shown = [row[2] for row in table(ROOT / "README.md", "time of")]
    assert len(shown) == 7
    assert set(shown) <= measured
