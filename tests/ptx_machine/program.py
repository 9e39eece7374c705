"""PTX text as a program: parameters, registers and instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_ENTRY = re.compile(r"\.visible \.entry ([\w$]+)\s*\((.*?)\)([^{]*)\{", re.DOTALL)
_PARAM = re.compile(r"\.param (?:\.align (\d+) )?\.[bufs](\d+)[^,]*? ([\w$]+)(?:\[(\d+)\])?\s*(?:,|$)")
_SHARED = re.compile(r"\.shared \.align (\d+) \.b8 ([\w$]+)\[(\d*)\];")
_REGISTERS = re.compile(r"\.reg \.(pred|[bufs]\d+)\s+(.*)", re.DOTALL)
_GUARD = re.compile(r"@(!?)(%?[\w$]+)\s+")
_LABEL = re.compile(r"([\w$]+):")


@dataclass(frozen=True)
class Address:
    """`[base + offset]`; the base is a register or a symbol."""

    base: str
    offset: int


@dataclass(frozen=True)
class Instruction:
    """`opcode` is split at its dots; `guard` is a predicate and whether it is negated."""

    text: str
    opcode: tuple[str, ...]
    operands: list[str | Address | tuple[str, ...]]
    guard: tuple[str, bool] | None

    def has(self, *modifiers: str) -> bool:
        return any(m in self.opcode for m in modifiers)


@dataclass
class Kernel:
    """An entry: where its parameters lie, its registers' types, its code, and where labels and shared symbols are."""

    name: str
    params: dict[str, int] = field(default_factory=dict)  # offsets
    param_bytes: int = 0
    registers: dict[str, str] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)  # offsets; dynamic memory begins behind the static
    static_shared: int = 0


def parse(text: str) -> list[Kernel]:
    """The entries of a module."""
    text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL))
    shared = [(int(align), name, int(size or 0)) for align, name, size in _SHARED.findall(text)]
    kernels = []
    for found in _ENTRY.finditer(text):
        kernel = Kernel(found[1])
        for align, size, name, count in _PARAM.findall(" ".join(found[2].split())):
            _add_parameter(kernel, name, _SIZES[size], int(count or 1), int(align or 0))
        body = _body(text, found.end())
        inner = [(int(a), n, int(s or 0)) for a, n, s in _SHARED.findall(body)]
        for align, name, size in sorted([*shared, *inner], key=lambda s: s[2] == 0):
            kernel.shared[name] = -(-kernel.static_shared // align) * align
            kernel.static_shared = kernel.shared[name] + size
        _add_code(kernel, _SHARED.sub("", body))
        kernels.append(kernel)
    return kernels


def _add_parameter(kernel: Kernel, name: str, size: int, count: int, align: int) -> None:
    align = align or size
    kernel.params[name] = -(-kernel.param_bytes // align) * align
    kernel.param_bytes = kernel.params[name] + size * count


def _body(text: str, begin: int) -> str:
    depth, end = 1, begin
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[begin : end - 1]


def _add_code(kernel: Kernel, body: str) -> None:
    """Statements of a body; registers that a scope of inline assembly declares get names of their own."""
    body = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", body, flags=re.MULTILINE)
    scopes: list[dict[str, str]] = [{}]
    at = opened = 0
    while at < len(body):
        if body[at].isspace() or body[at] == ";":
            at += 1
        elif body[at] in "{}":
            opened += body[at] == "{"
            scopes = [*scopes, {}] if body[at] == "{" else scopes[:-1]
            at += 1
        elif label := _LABEL.match(body, at):
            kernel.labels[label[1]] = len(kernel.code)
            at = label.end()
        else:
            end = body.index(";", at)
            _add_statement(kernel, " ".join(body[at:end].split()), scopes, opened)
            at = end + 1


def _add_statement(kernel: Kernel, statement: str, scopes: list[dict[str, str]], opened: int) -> None:
    if declared := _REGISTERS.match(statement):
        for name in declared[2].split(","):
            for one in _numbered(name.strip()):
                if len(scopes) > 1:
                    scopes[-1][one] = f"{one}#{opened}"
                kernel.registers[scopes[-1].get(one, one)] = declared[1]
    elif not statement.startswith("."):
        kernel.code.append(_instruction(statement, {old: new for scope in scopes for old, new in scope.items()}))


def _numbered(name: str) -> list[str]:
    """`%r<3>` declares %r0 to %r2."""
    found = re.fullmatch(r"(.*)<(\d+)>", name)
    return [f"{found[1]}{i}" for i in range(int(found[2]))] if found else [name]


def _instruction(text: str, renamed: dict[str, str]) -> Instruction:
    guard, rest = None, text
    if found := _GUARD.match(text):
        guard, rest = (renamed.get(found[2], found[2]), bool(found[1])), text[found.end() :]
    opcode, _, operands = rest.partition(" ")
    return Instruction(text, tuple(opcode.split(".")), [_operand(x, renamed) for x in _split(operands)], guard)


def _split(text: str) -> list[str]:
    """At commas that are not between braces or brackets."""
    return [x.strip() for x in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if x.strip()]


def _operand(text: str, renamed: dict[str, str]) -> str | Address | tuple[str, ...]:
    if text.startswith("{"):
        return tuple(renamed.get(x.strip(), x.strip()) for x in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(renamed.get(base, base), int(offset or "0", 0))
    return renamed.get(text, text)
