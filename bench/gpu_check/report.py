"""A run's lines for people: each unit when it is done, and one short table at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.gpu_check.records import FAILED, GREEN, STATES

Line = Mapping[str, Any]
_MET = {True: "met", False: "MISSED", None: "not judged"}
_WIDTH = 100  # characters of a detail in the table
_SHOWN = (("graph", "cold"), ("eager", "cold"))  # the times of the table


def progress(line: Line) -> str | None:
    """What is printed when a line comes in, if anything."""
    if line["kind"] != "unit":
        return None
    state = line["state"] if line["state"] == GREEN else line["state"].upper()
    detail = f": {line['detail'].splitlines()[0][:_WIDTH]}" if line["detail"] else ""
    return f"  {state:6} {line['part']}: {line['unit']} ({line['seconds']:.1f} s){detail}"


def failed(lines: Iterable[Line]) -> bool:
    """Whether anything of ours went wrong or a target was missed."""
    return any(
        (line["kind"] == "unit" and line["state"] in FAILED) or (line["kind"] == "verdict" and line["met"] is False)
        for line in lines
    )


def table(lines: Sequence[Line]) -> str:
    """Parts, ceilings, times of the cases, the model's ratios, targets, and whatever was not as it should be."""
    sections = [_parts(lines), _ceilings(lines), _times(lines), _ratios(lines), _verdicts(lines), _problems(lines)]
    return "\n\n".join("\n".join(section) for section in sections if section)


def _of(lines: Sequence[Line], kind: str) -> list[Line]:
    return [line for line in lines if line["kind"] == kind]


def _parts(lines: Sequence[Line]) -> list[str]:
    rows = []
    for part in _of(lines, "part"):
        states = Counter(unit["state"] for unit in _of(lines, "unit") if unit["part"] == part["part"])
        counted = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
        rows.append([part["part"], f"{part['seconds']:.0f} s", counted or part["state"]])
    return _aligned([["part", "took", "units"], *rows]) if rows else []


def _ceilings(lines: Sequence[Line]) -> list[str]:
    found = []
    for line in _of(lines, "ceiling"):
        unit, scale = ("TB/s", 1e12) if line["what"] == "memory" else ("TFLOP/s", 1e12)
        found.append(f"{line['what']} {line['rate'] / scale:.2f} {unit}")
    return [f"ceilings: {', '.join(found)}"] if found else []


def _times(lines: Sequence[Line]) -> list[str]:
    """Medians in microseconds: recorded into a graph with inputs out of the cache, and call by call."""
    times = [line for line in _of(lines, "time") if line["part"] == "micro"]
    if not times:
        return []
    rows = [["us [p20, p80], inputs cold", *(launch for launch, _ in _SHOWN), "floor"]]
    for unit in dict.fromkeys(line["unit"] for line in times):
        floors = [line["seconds"] for line in _of(lines, "floor") if line["unit"] == unit]
        rows.append([unit, "", "", f"{1e6 * floors[0]:.1f}" if floors else ""])
        mine = [line for line in times if line["unit"] == unit]
        for name in dict.fromkeys(line["name"] for line in mine):
            rows.append([f"  {name}", *(_spread(mine, name, mode) for mode in _SHOWN), ""])
    return _aligned(rows)


def _spread(times: Sequence[Line], name: str, mode: tuple[str, str]) -> str:
    for line in times:
        if line["name"] == name and (line["launch"], line["buffers"]) == mode:
            median, low, high = (1e6 * line["seconds"][key] for key in ("median", "p20", "p80"))
            return f"{median:.1f} [{low:.1f}, {high:.1f}]"
    return "-"


def _ratios(lines: Sequence[Line]) -> list[str]:
    found = [line for line in _of(lines, "ratio") if line["part"] == "end-to-end"]
    if not found:
        return []
    rows = [["end to end", "time of / time of", "ratio [p20, p80]"]]
    for line in found:
        shown = "{median:.2f} [{p20:.2f}, {p80:.2f}]".format(**line["ratio"])
        rows.append([line["unit"], f"{line['over']} / {line['under']}", shown])
    return _aligned(rows)


def _verdicts(lines: Sequence[Line]) -> list[str]:
    rows = [["case", "target", "least", "measured", "against", ""]]
    for line in _of(lines, "verdict"):
        value = "-" if line["value"] is None else f"{line['value']:.2f}"
        rows.append([line["unit"], line["target"], f"{line['least']:g}", value, line["over"], _MET[line["met"]]])
    return _aligned(rows) if len(rows) > 1 else []


def _problems(lines: Sequence[Line]) -> list[str]:
    found = []
    for line in lines:
        if line["kind"] == "unit" and line["state"] != GREEN:
            found.append(f"{line['state'].upper()} {line['part']}: {line['unit']}: {_short(line['detail'])}")
        elif line["kind"] == "peer" and line["part"] != "numerics" and line["state"] == "error":
            found.append(f"peer {line['name']} in {line['unit']}: {_short(line['detail'])}")
    missing = {line["name"] for line in _of(lines, "peer") if line["state"] == "not installed"}
    return found + ([f"peers not installed: {', '.join(sorted(missing))}"] if missing else [])


def _short(text: str) -> str:
    return text.splitlines()[0][:_WIDTH] if text else ""


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
