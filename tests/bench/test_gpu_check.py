"""gpu-check as far as it goes without a GPU: cases, time, processes, lines, report, verdicts, and its dry run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import checkout
from bench.attention_inputs import build
from bench.ceilings import Work
from bench.gpu_check import calls, cases, graphs, grid, micro, numerics, plots, records, report, runner, sanitizer
from bench.gpu_check import command as gpu_check
from bench.gpu_check.budget import Budget
from bench.gpu_check.cases import CHECKED, CUDA, PAGED, PEERS, TIMED, Target
from bench.gpu_check.parts import BY_NAME, PARTS, Part
from bench.gpu_check.records import ERROR, GREEN, NOT_AVAILABLE, NOT_RUN, RED, NotAvailable
from bench.gpu_check.setting import OURS, Setting
from bench.gpu_check.timing import Timed, interleave
from bench.gpu_check.verdicts import floor, judge
from bench.gpu_check.worker import work
from bench.measure import SCHEMA, CheckFailed, Sample

DRY = Setting("cpu", "reference", True)
FULL = Setting("cuda", None, False, {"memory": 4e12, "bf16": 8e14})


def samples(*seconds: float) -> list[Sample]:
    return [Sample(i, s, s, 0.0) for i, s in enumerate(seconds)]


# cases and targets


def test_the_cases_are_those_with_targets() -> None:
    found = {t.name: {(x.text, x.least) for x in t.targets} for t in TIMED if t.targets}
    assert found == {
        "prefill B16 prompts1 P128 N1024 32/8 D128 causal": {
            ("SDPA flash on concatenated keys", 0.95), ("concatenation + SDPA flash", 1.3), ("FlexAttention", 1.0),
        },
        "prefill B64 prompts1 P64 N128 16/16 D64 causal": {("concatenation + the best SDPA", 1.5)},
        "train B16 prompts16 P128 N512 32/8 D128 causal": {("concatenation + the best SDPA", 1.2)},
        "decode B128 prompts8 P256 S512 32/8 D128": {
            ("copy bandwidth", 0.6), ("best peer that reads the prefix per row", 1.3),
            ("CUDA, copy bandwidth", 0.75), ("CUDA, best peer that reads the prefix per row", 1.5),
        },
        "decode B256 prompts256 P32 S128 32/8 D128": {("best peer", 1.0)},
        "decode B64 prompts1 P8192 S128 32/8 D128": {
            ("CUDA, decoding by row on shared pages", 10.0), ("CUDA, FlashInfer cascade", 1.1),
        },
        "decode B8 prompts8 P64 S256 32/8 D128": {("CUDA, best peer", 1.0), ("CUDA, 12 us", 1.0)},
    }  # fmt: skip
    assert len({t.name for t in TIMED}) == len(TIMED) and len({c.name for c in CHECKED}) == len(CHECKED)
    assert all(t.subject == PAGED for t in TIMED if t.case.queries == 1)


def test_patterns_match_whom_they_mean() -> None:
    peers = Target("", 1.0, PEERS)
    for name in ("sdpa flash", "concatenation + sdpa cudnn", "flex", "varlen", "flash-attn 3", "flashinfer cascade"):
        assert peers.matches(name)
    assert not any(peers.matches(name) for name in (OURS, PAGED, "ours, flash"))
    assert not Target("", 1.0, cases.BY_ROW).matches("flashinfer cascade")
    assert not Target("", 1.0, ("sdpa flash",)).matches("concatenation + sdpa flash")


# verdicts


def test_a_ratio_is_to_the_quickest_that_is_meant() -> None:
    timed = {OURS: samples(1.0, 1.0, 1.0), "sdpa flash": samples(1.4, 1.2, 1.3), "sdpa cudnn": samples(1.1, 1.6, 1.5)}
    over = Target("best", 1.2, ("sdpa *",))
    found = judge(over, OURS, timed, Work(1.0, 1.0), FULL)
    assert found == {"value": 1.3, "over": "sdpa flash", "met": True}
    assert judge(Target("best", 1.4, ("sdpa *",)), OURS, timed, Work(1, 1), FULL)["met"] is False
    assert judge(over, OURS, timed, Work(1, 1), DRY)["met"] is None  # a dry run judges nothing
    assert judge(Target("none", 1.0, ("flex",)), OURS, timed, Work(1, 1), FULL)["value"] is None
    assert judge(over, PAGED, timed, Work(1, 1), FULL)["met"] is None


def test_bandwidth_is_unique_bytes_over_time_and_ceiling() -> None:
    share = Target("copy bandwidth", 0.6)
    found = judge(share, OURS, {OURS: samples(1e-3)}, Work(0.0, 2.8e9), FULL)
    assert found["value"] == pytest.approx(0.7) and found["met"] is True
    assert judge(share, OURS, {OURS: samples(1e-3)}, Work(0.0, 2.8e9), Setting())["met"] is None


def test_a_time_is_a_target_too() -> None:
    target = Target("12 us", 1.0, subject=CUDA, seconds=12e-6)
    found = judge(target, CUDA, {CUDA: samples(10e-6, 9e-6, 16e-6)}, Work(0.0, 1.0), FULL)
    assert found == {"value": pytest.approx(1.2), "over": "12 us", "met": True}
    assert judge(target, CUDA, {OURS: samples(1.0)}, Work(0.0, 1.0), FULL)["met"] is None
    told: list[dict] = []
    micro.verdicts.tell(TIMED[5], Work(1.0, 1.0), [], FULL, lambda kind, **values: told.append(values))
    missing = [x["over"] for x in told if "target" in x]
    assert missing == [f"{CUDA} was not timed"] * 2  # not ours by another kernel


def test_the_floor_is_the_higher_one_of_the_two() -> None:
    rates = {"memory": 1e12, "bf16": 1e14}
    assert floor(Work(1e11, 1e8), rates) == {"seconds": 1e-3, "bound": "compute"}
    assert floor(Work(1e9, 1e9), rates) == {"seconds": 1e-3, "bound": "memory"}
    assert floor(Work(1e11, 0.9e9), rates) == {"seconds": 1e-3, "bound": "both"}
    assert floor(Work(1e11, 1e9), {"memory": 1e12}) is None


# lines


def test_lines_say_what_their_kind_has() -> None:
    good = {"schema": SCHEMA, "kind": "unit", "part": "a", "unit": "b", "state": GREEN, "seconds": 1.0, "detail": ""}
    assert records.parse(records.text(good)) == good
    for change, message in (
        ({"kind": "other"}, "kind is 'other'"), ({"schema": 0}, "schema is 0"), ({"state": "fine"}, "state is 'fine'"),
    ):  # fmt: skip
        assert message in (records.problem(good | change) or "")
    with pytest.raises(ValueError, match="a unit line lacks detail, seconds"):
        records.text({k: v for k, v in good.items() if k not in ("detail", "seconds")})


def test_a_part_is_as_bad_as_its_worst_unit() -> None:
    sets = ({GREEN, RED}, {RED, ERROR}, {GREEN, NOT_RUN}, {GREEN, NOT_AVAILABLE}, ())
    assert [records.together(states) for states in sets] == [RED, ERROR, NOT_RUN, GREEN, NOT_AVAILABLE]


# time


def test_what_a_part_leaves_the_others_get() -> None:
    now = [0.0]
    budget = Budget(500.0, lambda: now[0])
    first, second, third = (Part(name, "", "", share) for name, share in (("a", 100), ("b", 50), ("c", 50)))
    assert budget.share(first, [second, third]) == pytest.approx(245)
    now[0] = 90.0
    assert budget.share(second, [third]) == pytest.approx(200)
    now[0] = 478.0
    assert budget.share(second, [third]) == pytest.approx(12)  # too little to share
    now[0] = 485.0
    assert budget.share(third, []) == 0.0


def test_the_default_time_is_below_nine_minutes() -> None:
    parser = argparse.ArgumentParser()
    gpu_check.add_arguments(parser)
    args = parser.parse_args([])
    assert args.minutes * 60 + runner._GRACE < 540 and args.part == [part.name for part in PARTS]
    for bad in (["--minutes", "0"], ["--minutes", "-1"], ["--part", "nothing"]):
        with pytest.raises(SystemExit):
            parser.parse_args(bad)


# processes


WORKER = """
import json, os, sys, time
request = json.loads(sys.stdin.read())
def say(kind, unit, **more):
    print(json.dumps({"schema": %d, "kind": kind, "part": request["part"], "unit": unit} | more), flush=True)
for unit in request["units"]:
    say("begin", unit)
    if unit == "crash": os.abort()
    if unit == "hang": time.sleep(600)
    if unit == "noise": print("nothing of ours", flush=True)
    state = "error" if unit == "lost" else "green"
    say("unit", unit, state=state, seconds=0.0, detail="")
    if unit == "lost": sys.exit(3)
"""


def driven(monkeypatch: pytest.MonkeyPatch, units: list[str], worker: str = WORKER % SCHEMA, **more) -> list[dict]:
    monkeypatch.setattr(runner, "_WORKER", (sys.executable, "-c", worker))
    lines: list[dict] = []
    part = Part("numerics", "numerics", "", 1, **more)
    runner.drive(part, units, DRY, 60.0, lines.append)
    assert all(records.problem(line) is None for line in lines)
    return lines


def test_a_process_that_dies_takes_one_unit_with_it(monkeypatch) -> None:
    lines = driven(monkeypatch, ["a", "crash", "b", "lost", "c", "noise"])
    states = {line["unit"]: line["state"] for line in lines if line["kind"] == "unit"}
    assert states == {"a": GREEN, "crash": ERROR, "b": GREEN, "lost": ERROR, "c": GREEN, "noise": GREEN}
    assert [line["unit"] for line in lines if line["kind"] == "unit"] == ["a", "crash", "b", "lost", "c", "noise"]
    assert "status -6" in next(line["detail"] for line in lines if line["unit"] == "crash")
    assert "nothing of ours" in next(line["text"] for line in lines if line["kind"] == "note")


def test_a_unit_that_hangs_is_stopped(monkeypatch) -> None:
    lines = driven(monkeypatch, ["hang", "b"], unit_seconds=1.0)
    assert [(line["unit"], line["state"]) for line in lines] == [("hang", ERROR), ("b", GREEN)]
    assert lines[0]["detail"] == "stopped: no word from it for 1 s"


def test_processes_side_by_side_do_every_unit_once(monkeypatch) -> None:
    units = [f"unit {i}" for i in range(7)]
    lines = driven(monkeypatch, units, processes=3)
    assert sorted(line["unit"] for line in lines) == units


def test_a_worker_that_cannot_start_ends(monkeypatch) -> None:
    lines = driven(monkeypatch, ["a", "b"], worker="raise SystemExit('no torch here')")
    assert [line["state"] for line in lines] == [ERROR, ERROR] and "no torch here" in lines[0]["detail"]


def test_without_time_nothing_runs_and_all_is_told(monkeypatch) -> None:
    lines: list[dict] = []
    runner.drive(PARTS[1], ["a", "b"], DRY, 0.0, lines.append)
    assert [(line["unit"], line["state"]) for line in lines] == [("a", NOT_RUN), ("b", NOT_RUN)]


def test_units_are_guarded(monkeypatch, tmp_path: Path) -> None:
    def run(unit, setting, emit) -> None:
        emit("note", text="here")
        if unit != "good":
            raise {"wrong": CheckFailed("off"), "absent": NotAvailable("no tool"), "bad": ValueError("odd")}[unit]

    monkeypatch.setattr(sanitizer, "run", run)
    with (tmp_path / "lines").open("w+") as out:
        assert work(BY_NAME["sanitizer"], ["good", "wrong", "absent", "bad"], DRY, 60.0, out) == 0
        assert work(BY_NAME["sanitizer"], ["late"], DRY, 0.0, out) == 0
        out.seek(0)
        lines = [records.parse(line) for line in out]
    found = [(line["unit"], line["state"]) for line in lines if line["kind"] == "unit"]
    assert found == [("good", GREEN), ("wrong", RED), ("absent", NOT_AVAILABLE), ("bad", ERROR), ("late", NOT_RUN)]
    assert "ValueError: odd (test_gpu_check.py:" in lines[-2]["detail"]
    assert all(line["part"] == "sanitizer" for line in lines if line["kind"] == "note")


# report


def verdict(met: bool | None) -> dict:
    return {
        "kind": "verdict", "part": "micro", "unit": "a case", "target": "peer", "least": 1.0, "value": 0.9,
        "over": "flex", "met": met,
    }  # fmt: skip


def unit(state: str) -> dict:
    return {"kind": "unit", "part": "micro", "unit": "a case", "state": state, "seconds": 1.0, "detail": "because\nof"}


def test_status() -> None:
    assert not report.failed([unit(GREEN), unit(NOT_RUN), unit(NOT_AVAILABLE), verdict(True), verdict(None)])
    assert all(report.failed([line]) for line in (unit(RED), unit(ERROR), verdict(False)))


def test_the_table_names_what_is_missed_missing_and_not_run() -> None:
    peers = [{"kind": "peer", "part": "micro", "unit": "a case", "name": "flashinfer", "state": "not installed"}]
    peers += [peers[0] | {"name": "flex", "state": "error", "detail": "no room"}]
    shown = report.table([unit(NOT_RUN), verdict(False), *peers])
    assert "0.90" in shown and "MISSED" in shown
    assert "NOT RUN micro: a case: because" in shown
    assert "peer flex in a case: no room" in shown and "peers not installed: flashinfer" in shown
    assert report.progress(unit(RED)) == "  RED    micro: a case (1.0 s): because"


# without a GPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(capsys) -> None:
    assert command.main(["gpu-check"]) == gpu_check.NO_GPU
    assert "gpu-check needs an NVIDIA GPU" in capsys.readouterr().err


def test_the_dry_run_goes_through_processes_and_writes_its_file(tmp_path: Path, capsys) -> None:
    out = tmp_path / "run.jsonl"
    assert command.main(["gpu-check", "--dry-run", "--part", "ceilings", "sanitizer", "--out", str(out)]) == 0
    lines = [records.parse(line) for line in out.read_text().splitlines()]
    assert [line["kind"] for line in (lines[0], lines[-1])] == ["machine", "end"]
    assert lines[0]["benchmark"] == "gpu-check" and lines[0]["device"] == "cpu" and lines[0]["quick"]
    assert {line["what"] for line in lines if line["kind"] == "ceiling"} == {"memory", "bf16", "fp16", "fp32"}
    states = {line["unit"]: line["state"] for line in lines if line["kind"] == "unit"}
    assert states["memcheck"] == NOT_AVAILABLE and states["bf16"] == GREEN
    assert "sanitizer  " in capsys.readouterr().out


@pytest.mark.parametrize("part", [p.name for p in PARTS])
def test_every_part_names_its_units_once(part: str) -> None:
    for setting in (DRY, FULL):
        units = list(BY_NAME[part].units(setting))
        assert units and len(set(units)) == len(units)


def run_unit(module, name: str, setting: Setting = DRY) -> list[dict]:
    lines: list[dict] = []

    def emit(kind: str, **values) -> None:
        lines.append({"schema": SCHEMA, "kind": kind, "part": "x", "unit": name, **values})
        assert records.problem(lines[-1]) is None

    module.run(name, setting, emit)
    return lines


@pytest.mark.parametrize("name", [n for n in numerics.units(DRY) if "timed" not in n][::7])
def test_numerics(name: str) -> None:
    found = run_unit(numerics, name)
    assert [line["who"] for line in found if line["kind"] == "check"] == ["reference"]
    assert all(0 <= share <= 4 for line in found for share in line["errors"].values())


def test_a_wrong_kernel_is_red(monkeypatch) -> None:
    call = grid.GRID["grouped_linear odd size"](torch.float16)
    right = calls.Right.of(call)
    good = call.oracle()
    right.errors(good)
    for name, x in good.items():
        flat = x.clone().flatten()
        flat[int(flat.isfinite().nonzero()[-1])] += 8 * right.bound[name]
        with pytest.raises(CheckFailed, match=f"{name} is off"):
            right.errors(good | {name: flat.view(x.shape)})
        with pytest.raises(CheckFailed, match=f"{name} is not finite"):
            right.errors(good | {name: torch.full_like(x, torch.nan)})
    values = iter(range(100))
    monkeypatch.setattr(calls.Call, "ours", lambda self, impl: {n: x + next(values) * 1e-6 for n, x in good.items()})
    with pytest.raises(CheckFailed, match="differs between runs"):
        run_unit(numerics, "grouped_linear odd size, fp16")


def test_what_is_not_written_is_seen() -> None:
    with numerics.poisoned():
        assert torch.empty(7).isnan().all() and torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", list(cases.timed(DRY))[2:4])
def test_micro(name: str) -> None:
    lines = run_unit(micro, name, Setting("cpu", "reference", True, {"memory": 1e10, "bf16": 1e11}))
    subject = cases.timed(DRY)[name].subject
    times = {(line["name"], line["launch"], line["buffers"]) for line in lines if line["kind"] == "time"}
    assert {(subject, "eager", "cold"), (subject, "eager", "warm"), ("sdpa math", "eager", "cold")} <= times
    ratios = [line for line in lines if line["kind"] == "ratio"]
    assert ratios and all(line["under"] == subject for line in ratios)
    verdicts = [line for line in lines if line["kind"] == "verdict"]
    assert len(verdicts) >= len(cases.timed(DRY)[name].targets) and all(line["met"] is None for line in verdicts)
    assert [line["kind"] for line in lines].index("check") < [line["kind"] for line in lines].index("time")


def test_no_time_of_ours_that_is_wrong(monkeypatch) -> None:
    from bench import attention_baselines

    usual = attention_baselines.prefix_attention
    monkeypatch.setattr(attention_baselines, "prefix_attention", lambda *a, **k: usual(*a, **k) + 1)
    with pytest.raises(CheckFailed, match="ours"):
        run_unit(micro, next(iter(cases.timed(DRY))))


def test_a_peer_that_fails_fails_alone(monkeypatch) -> None:
    from bench.gpu_check import torch_peers

    monkeypatch.setattr(torch_peers, "_ready", lambda *a: 1 / 0)
    lines = run_unit(micro, list(cases.timed(DRY))[1])
    assert [(x["name"], x["state"]) for x in lines if x["kind"] == "peer"] == [("sdpa math", "error")]
    assert {x["name"] for x in lines if x["kind"] == "time"} == {OURS, "concatenation + sdpa math"}


def test_graphs() -> None:
    units = graphs.units(DRY)
    for name in (units[1], units[3], units[-1]):
        assert run_unit(graphs, name) == []
    call = grid.GRID["prefix_attention causal"](torch.bfloat16)
    other = graphs._other_extents(call, 1)
    assert not torch.equal(call.tensors["prefix_start"], other.tensors["prefix_start"])
    assert other.oracle()["out"].isfinite().all()  # nobody reads the poison
    found = graphs._grads(call, "reference", {})
    assert {"output 0", "output 1", "dq", "dprefix_k"} <= found.keys() and found["dq"].isfinite().all()


def test_what_the_sanitizer_says() -> None:
    watched = '{"state": "green"}\n========= ERROR SUMMARY: 0 errors\n'
    sanitizer.judge("memcheck", 0, watched)
    assert sanitizer.summary(watched) == "ERROR SUMMARY: 0 errors"
    with pytest.raises(CheckFailed, match=r"memcheck: =+ Invalid __global__ read"):
        sanitizer.judge("memcheck", 86, "noise\n========= Invalid __global__ read of size 2\n")
    with pytest.raises(NotAvailable, match="does not run on this machine"):
        sanitizer.judge("memcheck", 1, "========= Error: Device not supported\n")
    for status, text in ((1, watched), (0, '{"state": "red"}')):
        with pytest.raises(RuntimeError, match="ended with status"):
            sanitizer.judge("racecheck", status, text)
    sanitizer.run("one process", DRY, print)


def test_decoding_in_graphs_is_compared_to_the_bare_backbone() -> None:
    from bench.gpu_check import end_to_end

    lines = run_unit(end_to_end, "decode in graphs")
    assert [(x["over"], x["under"]) for x in lines if x["kind"] == "ratio"] == [("bare", "ours")]
    (verdict,) = (x for x in lines if x["kind"] == "verdict")
    assert verdict["least"] == 0.97 and verdict["met"] is None
    assert all(share <= 4 for x in lines if x["kind"] == "check" for share in x["errors"].values())


@pytest.mark.parametrize("name", ["forward, mixed", "train", "together 16", "generate"])
def test_end_to_end(name: str) -> None:
    from bench.gpu_check import end_to_end

    lines = run_unit(end_to_end, name)
    assert [line for line in lines if line["kind"] == "peer"] == []
    assert all(share <= 4 for line in lines if line["kind"] == "check" for share in line["errors"].values())
    pairs = {tuple(x.rpartition(": ")[2] for x in (r["over"], r["under"])) for r in lines if r["kind"] == "ratio"}
    more = {("bare, in parts", "bare")} if name.startswith("together") else set()
    assert pairs == {("peft", "ours"), ("bare", "ours")} | more


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = run_unit(micro, list(cases.timed(DRY))[1], Setting("cpu", "reference", True, {"memory": 1e9, "bf16": 1e9}))
    drawn = plots.draw([line | {"part": "micro"} for line in lines], tmp_path / "run")
    assert [path.name for path in drawn] == ["run-times.svg", "run-targets.svg"]
    assert all("<svg" in path.read_text() for path in drawn)
    assert plots.draw([], tmp_path / "none") == []


def test_turns_and_calls() -> None:
    order: list[str] = []

    def timed(name: str) -> Timed:
        return Timed(lambda: order.append(name), 4, lambda: None)

    found = interleave({"a": timed("a"), "b": timed("b")}, 3, "cpu")
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]  # a warm-up, then turns
    assert [s.round for s in found["a"]] == [0, 1, 2]


def test_a_checkout_finds_its_kernels(monkeypatch) -> None:
    name = "fastprompt._triton"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(checkout.importlib.util, "find_spec", lambda _: None)
    checkout.find_kernels()
    assert Path(sys.modules[name].__path__[0]) == checkout.ROOT / "kernels" / "triton"
    monkeypatch.delitem(sys.modules, name)


def test_inputs_are_the_same_for_a_seed_on_a_device() -> None:
    case = TIMED[3].shrunk().case
    one, two = build(case, "bf16"), build(case, "bf16", device="cpu")
    assert torch.equal(one.q, two.q) and one.to("cpu").plan is one.plan
    assert json.dumps(DRY.request())
