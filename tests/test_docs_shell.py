"""Shell lines in README and docs/ name commands, options, targets, files and endpoints that exist."""

import argparse
import importlib.util
import os
import re
import sys

import pytest
from doc_pages import NOTEBOOKS, PAGES, ROOT, inline_commands, shell_lines
from typer.main import get_command

from bench.__main__ import COMMANDS
from fastprompt.cli import app

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KNOWN = {"fastprompt", "python", "make", "pip", "curl", "git", "cd", "printf", "sha256sum", "openssl", "torchrun"}
KNOWN.add("serve")  # of Ray
FASTPROMPT = get_command(app).commands


def commands(word):
    return [words for page in PAGES for words in shell_lines(page) if words[0] == word]


def check_bench(words):
    """A benchmark and its options."""
    if words in ([], ["--help"]):
        return
    parser = argparse.ArgumentParser(exit_on_error=False)
    COMMANDS[words[0]].load().add_arguments(parser)
    _, left = parser.parse_known_args(words[1:])
    assert left == [], words


def check_fastprompt(words):
    """A command and its options, their values too."""
    if words[0] == "bench":
        check_bench(words[1:])
    else:
        FASTPROMPT[words[0]].make_context(words[0], words[1:])


def check_python(words):
    """A module or a script that is there."""
    if words[0] != "-m":
        assert words[0] == "-c" or (ROOT / words[0]).is_file(), words
    elif words[1] == "bench":
        check_bench(words[2:])
    else:
        assert importlib.util.find_spec(words[1]) is not None, words


def test_every_shell_line_begins_with_a_known_command_or_a_script():
    for page in PAGES:
        for words in shell_lines(page):
            assert words[0] in KNOWN or os.access(ROOT / words[0], os.X_OK), (page.name, words)


def test_every_command_of_fastprompt_is_shown_and_parses():
    found = commands("fastprompt")
    assert {words[1] for words in found} == set(FASTPROMPT)
    for words in found:
        check_fastprompt(words[1:])


def test_what_python_runs_exists_and_benchmarks_parse():
    for words in commands("python"):
        check_python(words[1:])


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda p: f"{p.parent.name}-{p.name}")
def test_commands_in_the_text_exist(page):
    for words in inline_commands(page):
        if words[0] == "make":
            assert "=" in words[1] or words[1] in make_targets(), words
        elif words[0] == "python":
            check_python(words[1:])
        elif words[1] == "bench":
            check_bench(words[2:])
        else:  # in the text what is needed may be left out
            known = {name for parameter in FASTPROMPT[words[1]].params for name in parameter.opts}
            own = words[: words.index("--")] if "--" in words else words
            assert {word.partition("=")[0] for word in own if word.startswith("--")} <= known, words


def make_targets():
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_targets_of_make_and_the_tests_given_to_them_exist():
    for words in commands("make"):
        assert words[1] in make_targets(), words
        for path in re.findall(r"tests/[\w./]+", " ".join(words)):
            assert (ROOT / path).exists(), words


def test_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = "\n".join(page.read_text() for page in PAGES)
    named = re.findall(r"pip install [^\n`]*?(?:fastprompt|\.)\[([\w,]+)\]", text)
    assert named and {name for some in named for name in some.split(",")} <= set(extras)


def test_endpoints_exist():
    routes = "\n".join(path.read_text() for path in (ROOT / "fastprompt" / "serving" / "http").glob("*.py"))
    called = {word.partition("/")[2] for words in commands("curl") for word in words if word.startswith("localhost")}
    assert called
    for path in called:
        assert f'"/{path}"' in routes or f'"/{path.rpartition("/")[0]}/{{name}}"' in routes, path
