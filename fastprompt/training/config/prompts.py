"""One `[[prompt]]` with `[defaults]` under it: checked, and as the objects that training takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fastprompt.errors import FastPromptError
from fastprompt.prompts import METHODS, PromptConfig
from fastprompt.training.config.fields import field_names, made, nothing, with_nulls
from fastprompt.training.config.locate import KeyPath
from fastprompt.training.config.problems import Problems, Report, checked, near, shown, unknown
from fastprompt.training.config.tables import DataTable, PromptTable
from fastprompt.training.tasks import TASKS
from fastprompt.training.tasks.base import Task
from fastprompt.training.template import Template

T = TypeVar("T")
Values = Mapping[str, Any]
TYPE = "type"  # the key that names a task
COMMON = frozenset(PromptTable.model_fields)
METHOD_FIELDS = {name: field_names(cls) for name, cls in METHODS.items()}
OF_METHODS = frozenset[str]().union(*METHOD_FIELDS.values()) - COMMON
TASK_FIELDS = {name: field_names(cls) | {TYPE} for name, cls in TASKS.items()}
_REFERENCES = ("method", "shares", "init_from", "template")  # what a prompt is made from: "none" is as if not given
_SHARED = "comes from the prompt whose virtual tokens this one shares: leave it out"


@dataclass(frozen=True)
class PromptEntry:
    """A prompt of the file; `config` is None where it shares or starts from another's virtual tokens."""

    table: PromptTable
    config: PromptConfig | None
    template: Template | None
    task: Task
    data: DataTable

    @property
    def name(self) -> str:
        return self.table.name


@dataclass(frozen=True)
class Source:
    """Where a prompt of the file came from: its merged values, and the way back to the keys of the document.

    `all_values` has those defaults too that its method has no place for: in a sweep another method may have one.
    """

    values: Mapping[str, Any]
    all_values: Mapping[str, Any]
    origin: Callable[[KeyPath], KeyPath]


def merged(defaults: Values, own: Values) -> dict[str, Any]:
    """A prompt's values over the defaults; a default that its method or task does not have is left out."""
    both = all_merged(defaults, own)
    fits = fitting(both.get("method")) if "shares" not in own else COMMON - {"method", "init_from"}
    return {key: value for key, value in both.items() if key in own or key in fits}


def all_merged(defaults: Values, own: Values) -> dict[str, Any]:
    """A prompt's values over the defaults, whatever its method; a default that its task does not have is left out."""
    said = {"epochs", "steps"} if {"epochs", "steps"} & set(own) else set()  # how long is said in one way
    values = {key: value for key, value in {**defaults, **own}.items() if key in own or key not in said}
    for part in ("task", "data"):
        if isinstance(defaults.get(part), dict) and isinstance(own.get(part, {}), dict):
            values[part] = {**defaults[part], **own.get(part, {})}
    task = values.get("task")
    if isinstance(task, dict) and isinstance(task.get(TYPE), str) and task[TYPE] in TASKS:
        mine = own.get("task", {})
        values["task"] = {k: v for k, v in task.items() if k in mine or k in TASK_FIELDS[task[TYPE]]}
    return values


def method_fields(method: object) -> frozenset[str]:
    """Keys that a method has of its own; none for what is no method."""
    return METHOD_FIELDS.get(method, frozenset()) - COMMON if isinstance(method, str) else frozenset()


def fitting(method: object) -> frozenset[str]:
    """Keys that a prompt of this method may have; a template is for virtual tokens in place."""
    own = method_fields(method)
    return COMMON | own if "in_place" in own or not own else COMMON - {"template"} | own


def origin_of(defaults: Values, own: Values, here: KeyPath) -> Callable[[KeyPath], KeyPath]:
    """Turns a key of a merged prompt into the key of the document that it came from."""

    def origin(key: KeyPath) -> KeyPath:
        if not _holds(own, key) and _holds(defaults, key):
            return ("defaults", *key)
        return (*here, *key)

    return origin


def prompt_entry(values: Values, report: Report) -> PromptEntry | None:
    """The prompt that merged values describe, or None after reporting everything wrong with them."""
    values = {key: value for key, value in values.items() if not (key in _REFERENCES and value == nothing(key))}
    method, rest = values.get("method"), dict(values)
    of_method = {key: rest.pop(key) for key in method_fields(method) & set(rest)}
    for key in set(rest) - COMMON:
        del rest[key]
        if "shares" in values and key in OF_METHODS:
            report((key,), _SHARED)
        elif method_fields(method) or key not in OF_METHODS:
            report((key,), _unknown_key(key, method))
    table = checked(PromptTable, with_nulls(PromptTable, rest), report, "a prompt")
    template = _template(values.get("template"), report)
    if "template" in rest and method == "p_tuning":
        length = 1 if template is None else template.num_virtual_tokens
        of_method = {"num_virtual_tokens": length, "in_place": True, **of_method}
    config = _config(method, values, of_method, report)
    if template is not None and config is not None:
        _reported(lambda: template.check(config), ("template",), report)
    task = _task(values.get("task"), report)
    data = _data(values.get("data"), report)
    _one_length(values, report)
    if table is None or task is None or data is None:
        return None
    return PromptEntry(table, config, template, task, data)


def check_defaults(defaults: Values, problems: Problems) -> None:
    """Report defaults that no prompt could have."""
    report = problems.below(lambda key: ("defaults", *key))
    known = (COMMON | OF_METHODS) - {"name"}
    for key in set(defaults) - known:
        report((key,), "a name belongs to one prompt" if key == "name" else unknown(key, known, "a prompt"))
    for part, keys in (("task", frozenset[str]().union(*TASK_FIELDS.values())), ("data", set(DataTable.model_fields))):
        table = defaults.get(part, {})
        for key in set(table) - keys if isinstance(table, dict) else ():
            report((part, key), unknown(key, keys, f"a prompt's {part}"))


def _config(method: object, values: Values, of_method: Values, report: Report) -> PromptConfig | None:
    if "shares" in values:
        if method is not None:
            report(("method",), _SHARED)
        return None
    if method is None:
        if "init_from" not in values:
            report(("method",), f"missing: expected one of {', '.join(METHODS)}")
        return None
    if not isinstance(method, str) or method not in METHODS:
        report(("method",), f"{shown(method)} came, expected one of {', '.join(METHODS)}{near(method, METHODS)}")
        return None
    return made(METHODS[method], of_method, report, method)


def _task(values: object, report: Report) -> Task | None:
    if not isinstance(values, dict) or TYPE not in values:
        report(("task",), f"missing: expected a table with type = one of {', '.join(TASKS)}")
        return None
    kind = values[TYPE]
    if not isinstance(kind, str) or kind not in TASKS:
        report(("task", TYPE), f"{shown(kind)} came, expected one of {', '.join(TASKS)}{near(kind, TASKS)}")
        return None
    rest = {key: value for key, value in values.items() if key != TYPE}
    return made(TASKS[kind], rest, lambda key, text: report(("task", *key), text), f"task {kind}")


def _template(text: object, report: Report) -> Template | None:
    return _reported(lambda: Template(text), ("template",), report) if isinstance(text, str) else None


def _reported(make: Callable[[], T], key: KeyPath, report: Report) -> T | None:
    """What `make` gives, or None after reporting why it cannot."""
    try:
        return make()
    except FastPromptError as error:
        report(key, str(error))
        return None


def _data(values: object, report: Report) -> DataTable | None:
    if not isinstance(values, dict):
        report(("data",), 'missing: expected a table with train = "a file or a dataset\'s name"')
        return None
    return checked(
        DataTable, with_nulls(DataTable, values), lambda key, text: report(("data", *key), text), "a prompt's data"
    )


def _one_length(values: Values, report: Report) -> None:
    """How long a prompt trains is said in one way."""
    given = [key for key in ("epochs", "steps") if values.get(key, "none") != "none"]
    if len(given) != 1:
        came = f"{' and '.join(given)} came" if given else "missing"
        report((given[-1] if given else "epochs",), f"{came}: expected either epochs or steps")


def _unknown_key(key: str, method: object) -> str:
    """The message for a key that a prompt of this method does not have."""
    others = [name for name, fields in METHOD_FIELDS.items() if key in fields]
    if others:
        return f"{method} has no such key, {' and '.join(others)} {'has' if len(others) == 1 else 'have'}"
    return unknown(key, COMMON | (method_fields(method) or OF_METHODS), "a prompt")


def _holds(values: Any, key: KeyPath) -> bool:
    for part in key:
        if not isinstance(values, dict) or part not in values:
            return isinstance(values, list)
        values = values[part]
    return bool(key)
