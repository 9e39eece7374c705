"""`fastprompt generate`: one batch of texts, each behind its own prompt."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fastprompt.cli.backbones import Backbone, load_backbone, load_tokenizer
from fastprompt.cli.output import Json, console, emit
from fastprompt.errors import ArgumentError

BARE = "none"
Row = tuple[str | None, str]


def generate(
    backbone: Backbone,
    prompt: Annotated[list[str] | None, typer.Option(metavar="NAME=PATH", help="A prompt to load; repeat.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text to continue; repeat.")] = None,
    use: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="The prompt of each --text in turn, or of all; or 'none'.")
    ] = None,
    stdin: Annotated[bool, typer.Option("--stdin", help="Read lines NAME<tab>TEXT from standard input too.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to add at most.")] = 32,
    as_json: Json = False,
) -> None:
    """Continue every text greedily, all of them in one batch, each behind its own prompt or none."""
    from fastprompt import PromptedModel

    paths = _named_paths(prompt or [])
    rows = _option_rows(text or [], use or [], list(paths)) + (_lines(sys.stdin) if stdin else [])
    if not rows:
        raise ArgumentError("there is no text: give --text, or --stdin with lines NAME<tab>TEXT")
    tokenizer = load_tokenizer(backbone)
    model = PromptedModel(load_backbone(backbone), tokenizer)
    if not model.can_generate():
        raise ArgumentError(f"--backbone is a {type(model.backbone).__name__}, expected a model that generates text")
    for name, path in paths.items():
        model.load_prompt(name, path)
    started = time.perf_counter()
    outputs = continuations(model, tokenizer, rows, max_new_tokens)
    data = {
        "backbone": backbone,
        "rows": [{"prompt": n, "text": t, "output": o} for (n, t), o in zip(rows, outputs, strict=True)],
        "seconds": round(time.perf_counter() - started, 4),
    }
    emit(data, as_json, _render)


def continuations(model: Any, tokenizer: Any, rows: Sequence[Row], max_new_tokens: int) -> list[str]:
    """Greedy continuations of `(prompt, text)` rows, computed in one batch."""
    batch = tokenizer([text for _, text in rows], return_tensors="pt", padding=True).to(model.device)
    batch.pop("token_type_ids", None)
    for (_, text), count in zip(rows, batch.attention_mask.sum(1).tolist(), strict=True):
        if not count:
            raise ArgumentError(f"a text is {text!r}, which has no tokens: give each row some words to continue")
    tokens = model.generate(
        **batch,
        prompts=[name for name, _ in rows],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    start = 0 if model.config.is_encoder_decoder else batch.input_ids.shape[1]
    return tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)


def _named_paths(options: Sequence[str]) -> dict[str, str]:
    paths: dict[str, str] = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not (name and equals and path) or name == BARE:
            raise ArgumentError(f"--prompt is {option!r}, expected NAME=PATH with a name other than {BARE!r}")
        if name in paths:
            raise ArgumentError(f"--prompt {name!r} is given twice: choose another name")
        paths[name] = path
    return paths


def _option_rows(texts: Sequence[str], uses: Sequence[str], names: Sequence[str]) -> list[Row]:
    if not texts and not uses:
        return []
    if not uses and len(names) > 1:
        raise ArgumentError(f"{len(names)} prompts are loaded: say with --use which one each --text gets, or {BARE!r}")
    chosen = list(uses or names or [BARE])
    if not texts or len(chosen) not in (1, len(texts)):
        raise ArgumentError(f"--use is given {len(uses)} times for {len(texts)} texts: give it once, or once a --text")
    chosen = chosen * len(texts) if len(chosen) == 1 else chosen
    return [(_name(name), text) for name, text in zip(chosen, texts, strict=True)]


def _lines(lines: Iterable[str]) -> list[Row]:
    rows = []
    for number, line in enumerate(lines, 1):
        name, tab, text = line.rstrip("\r\n").partition("\t")
        if not tab or not name:
            raise ArgumentError(f"line {number} of the input is {line.strip()!r}, expected NAME<tab>TEXT")
        rows.append((_name(name), text))
    return rows


def _name(name: str) -> str | None:
    return None if name == BARE else name


def _render(data: dict[str, Any]) -> None:
    table = Table("prompt", "text", "output", box=SIMPLE_HEAD, pad_edge=False)
    for row in data["rows"]:
        table.add_row(Text(row["prompt"] or BARE), Text(row["text"]), Text(row["output"].strip()))
    console.print(table)
    console.print(f"rows in one batch: {len(data['rows'])}, {data['seconds']:.2f} s", style="dim")
