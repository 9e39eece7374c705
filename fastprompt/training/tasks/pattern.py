"""Texts with slots and one [MASK], the place where a language model's word answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fastprompt.errors import ArgumentError
from fastprompt.training.tasks.base import TaskContext
from fastprompt.training.tasks.reading import text_of

if TYPE_CHECKING:
    from fastprompt.training.template import Template

MASK = "[MASK]"
_CLOSING = re.compile(r"[^\w{}]*")  # what may follow the answer on a causal backbone, which does not read it


def check_pattern(pattern: object) -> None:
    """Raise unless `pattern` is a text with one [MASK]."""
    if not isinstance(pattern, str) or pattern.count(MASK) != 1:
        raise ArgumentError(f"pattern is {pattern!r}, expected a text with one {MASK}")
    _template(pattern)


def columns(pattern: str, context: TaskContext) -> tuple[str, ...]:
    """The columns that fill the slots."""
    return (context.template or _template(pattern)).columns


def setup_problems(pattern: str, context: TaskContext, masked: bool) -> list[str]:
    """What is wrong with the pattern, or the template in its place, on this backbone."""
    if masked and context.spec.causal:
        return ["masked is True, and the backbone is causal: set masked=False"]
    if not masked and not context.spec.causal:
        return ["masked is False, and the backbone reads in both directions: set masked=True"]
    if masked and context.tokenizer.mask_token_id is None:
        return ["masked is True, and the tokenizer has no mask token"]
    if context.template is not None and context.template.has_mask != masked:
        wanted = f"one {MASK}, where the answer stands" if masked else f"none with {MASK}: the answer follows the row"
        return [f"template is {context.template.text!r}, expected {wanted}"]
    if context.template is None and not masked and not _CLOSING.fullmatch(pattern.partition(MASK)[2]):
        return [f"pattern is {pattern!r}, and a causal backbone cannot read what stands behind {MASK}: put it last"]
    return []


def encode(
    pattern: str, example: Mapping[str, Any], context: TaskContext, masked: bool, truncate: str | None, behind: int = 0
) -> tuple[list[int], int]:
    """The ids of a filled pattern and the place whose logits answer; `behind` positions stay free after them.

    On a causal backbone the ids end right before the answer.
    """
    template = context.template or _template(pattern if masked else pattern.partition(MASK)[0])
    fields = {name: text_of(example, name) for name in template.columns}
    side = context.side(truncate)
    limit = None if side is None else context.room(behind)
    ids = template.encode(context.tokenizer, fields, limit, side, closing=masked)
    return ids, template.mask_position(context.tokenizer, ids) if masked else len(ids) - 1


def word_ids(word: str, pattern: str, context: TaskContext) -> tuple[int, ...]:
    """Tokens of a word where the answer stands: behind a space, unless [MASK] has none before it."""
    before, mask, _ = (pattern if context.template is None else context.template.text).partition(MASK)
    tokenizer = context.tokenizer
    if mask and before and not before[-1].isspace():
        return tuple(tokenizer(word, add_special_tokens=False)["input_ids"])
    known = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"a {word.strip()}", add_special_tokens=False)["input_ids"]
    if whole[: len(known)] == known:
        return tuple(whole[len(known) :])
    return tuple(tokenizer(word, add_special_tokens=False)["input_ids"])


def word_problems(words: Iterable[str], pattern: str, context: TaskContext, *, single: bool) -> list[str]:
    """Words without tokens, with unknown ones, or with several where `single` says that one is needed."""
    problems = []
    for word in words:
        ids = word_ids(word, pattern, context)
        tokens = ", ".join(context.tokenizer.convert_ids_to_tokens(list(ids)))
        if not ids or context.tokenizer.unk_token_id in ids:
            problems.append(f"the word {word!r} has no tokens of its own ({tokens}): choose another one")
        elif single and len(ids) > 1:
            problems.append(f"the word {word!r} has {len(ids)} tokens ({tokens}), expected one: choose another one")
    return problems


@lru_cache(maxsize=64)
def _template(text: str) -> Template:
    from fastprompt.training.template import Template  # which imports this package

    return Template(text)
