"""`fastprompt info`, and what the command shows of itself."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers

import fastprompt
from fastprompt import dispatch, env, native
from fastprompt.cli import output

COMMANDS = ("demo", "info", "import", "export", "inspect", "generate")


def test_help_names_every_command(run):
    text = run("--help").stdout
    assert all(f"  {name} " in text for name in COMMANDS)
    for name in COMMANDS:
        assert "--json" in run(name, "--help").stdout


def test_version(run):
    assert run("--version").stdout.strip() == fastprompt.__version__


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "fastprompt", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == fastprompt.__version__


def test_package_imports_neither_typer_nor_rich():
    code = "import sys, fastprompt.demo.run; print(sorted({'typer', 'rich', 'fastprompt.cli'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch):
    for name in env.in_force():
        monkeypatch.delenv(name)


def test_json_says_what_runs(run):
    data = json.loads(run("info", "--json").stdout)
    assert data["versions"]["transformers"] == transformers.__version__
    assert data["versions"]["fastprompt"] == fastprompt.__version__ and data["versions"]["torch"]
    assert data["threads"]["intra_op"] == torch.get_num_threads()
    assert data["devices"]["cpu"]
    assert len(data["ops"]) == len(dispatch.OPS) * len(dispatch.IMPLS)
    assert data["chosen"]["cpu"] == {
        op: dispatch.choose(op, None, torch.device("cpu"), torch.float32) for op in dispatch.OPS
    }
    assert data["environment"] == {} and data["problem"] is None and data["backbone"] is None


def test_table_names_every_op_and_reason(run, monkeypatch):
    monkeypatch.setattr(output.console, "_width", 200)
    text = run("info").stdout
    assert all(op in text for op in dispatch.OPS)
    assert all(row.reason in text for row in dispatch.explain())


def test_environment_in_force_is_shown(run):
    data = json.loads(run("info", "--json", env={"FASTPROMPT_IMPL": "reference"}).stdout)
    assert data["environment"] == {"FASTPROMPT_IMPL": "reference"}
    assert set(data["chosen"]["cpu"].values()) == {"reference"}


def test_native_kernels_and_their_instruction_set_are_shown(run):
    kernels = "no native kernels" if native.obstacle() else f"native kernels for {native.load().isa()}"
    assert json.loads(run("info", "--json").stdout)["devices"]["cpu"].endswith(kernels)


def test_an_instruction_set_that_is_not_there_is_reported_not_raised(run):
    if native.obstacle() is None:
        native.load.cache_clear()
        native.obstacle.cache_clear()
        data = json.loads(run("info", "--json", env={"FASTPROMPT_CPU_ISA": "mmx"}).stdout)
        rows = {(row["op"], row["impl"]): row for row in data["ops"]}
        assert "FASTPROMPT_CPU_ISA is 'mmx'" in rows["merge_states", "cpu"]["reason"]


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_an_implementation_that_cannot_be_is_reported_not_raised(run, flags):
    text = run("info", *flags, env={"FASTPROMPT_IMPL": "abacus", "COLUMNS": "200"}).stdout
    assert "FASTPROMPT_IMPL is 'abacus'" in text


def test_backbone_says_its_path(run, backbone):
    data = json.loads(run("info", "--json", "--backbone", backbone).stdout)
    assert "llama (hidden 32, 2 layers" in data["backbone"]["prompts"]
    assert "in place" in data["backbone"]["reasons"]
    assert "in place" in run("info", "--backbone", backbone, env={"COLUMNS": "200"}).stdout


def test_missing_backbone(fails, tmp_path):
    assert "no folder" in fails("info", "--backbone", tmp_path / "absent")
    assert "transformers cannot load" in fails("info", "--backbone", tmp_path)
    assert "transformers cannot load" in fails("info", "--backbone", "no-such-model-anywhere")


def test_a_decoding_step_is_explained_without_a_gpu(run):
    text = run("info", "--explain", "rows=128 prompts=8 P=256 S=512 heads=32/8 D=128").stdout
    assert "8 tiles of up to 16 rows" in text and "chosen on a GPU: cuda" in text and "not measured" in text
    data = json.loads(run("info", "--json", "--explain", "rows=8 prompts=8 P=64 S=256 D=80").stdout)
    assert data["chosen"] == "single" and "80 and 80 numbers" in data["why"] and data["tiles"] == 0
    assert set(data["paths"]) == {"cuda", "triton", "single"} and data["here"] in dispatch.IMPLS
    assert all(path["microseconds"] > 0 for path in data["paths"].values())
    single = json.loads(run("info", "--json", "--explain", "rows=64 prompts=1 P=256 S=1 bytes=4").stdout)
    assert single["chosen"] == "triton" and "numbers of 4 bytes" in single["why"]


def test_what_is_no_shape_is_an_error(fails):
    assert "has 'rows'" in fails("info", "--explain", "rows prompts")
