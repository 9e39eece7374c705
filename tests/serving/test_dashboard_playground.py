"""The dashboard's playground: one input under several prompts, side by side."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from dashboard_cases import text_engine, until, watched
from encoder_tools import TOKENIZER, classifier, tagger
from encoder_tools import engine as encoder_engine

from fastprompt.serving.registry import PromptRegistry
from fastprompt.store import save_prompt


def test_the_playground_streams_side_by_side(browser: Any, tmp_path: Path):
    engine = text_engine(tmp_path)
    with watched(browser, engine) as (page, port):
        page.wait_for_selector("#play-chips .chip")
        for _ in range(3):
            page.locator("#play-chips .chip button").first.click()
        for name in ("tenant-03", "backbone"):
            page.click("#play-name")
            page.keyboard.type(name)
            page.keyboard.press("Enter")
        page.fill("#play-text", "the city of")
        page.fill("#play-max", "9")
        page.keyboard.press("Tab")
        page.click("#play-run")
        until(page, "document.querySelectorAll('.result .note').length === 2")
        until(page, "[...document.querySelectorAll('.result .note')].every((n) => n.textContent.includes('9 tokens'))")
        found = page.locator(".result .out").all_text_contents()
        for name, text in zip(("tenant-03", "backbone"), found, strict=True):
            body = {"model": name, "prompt": "the city of", "max_tokens": 9, "temperature": 0}
            assert text == httpx.post(f"{port.url}/v1/completions", json=body).json()["choices"][0]["text"]
        engine.pause = 0.2
        page.fill("#play-max", "400")
        page.click("#play-text")
        page.keyboard.press("Control+Enter")
        until(page, "[...document.querySelectorAll('.out.running')].some((o) => o.textContent)")
        page.click("#play-stop")
        until(page, "[...document.querySelectorAll('.result .note')].every((n) => n.textContent === 'stopped')")
        assert page.is_enabled("#play-run") and page.is_disabled("#play-stop")
        engine.pause, engine.fail_after, engine.error = 0.0, 2, RuntimeError("no")
        page.click("#play-run")
        page.wait_for_selector(".result .wrong")


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_classifiers_side_by_side(browser: Any, tmp_path: Path, task: str):
    model, _ = classifier() if task == "sequence" else tagger()
    for name in model.prompt_names:
        save_prompt(tmp_path / name, model.library[name])
    engine = encoder_engine(model, PromptRegistry(tmp_path, model._info.spec))
    text = "jim flew to paris"
    with watched(browser, engine) as (page, port):
        page.wait_for_selector("#play-chips .chip")
        page.fill("#play-text", text)
        page.click("#play-run")
        until(page, "document.querySelectorAll('.result .note').length === 3")
        until(page, "[...document.querySelectorAll('.result .note')].every((n) => n.textContent.includes('tokens'))")
        shown = page.locator(".result").all()
        for card in shown:
            name = card.locator("h3").text_content()
            route = "classify" if task == "sequence" else "token-classify"
            (found,) = httpx.post(f"{port.url}/v1/{route}", json={"model": name, "input": text}).json()["data"]
            if task == "sequence":
                expected = [(e["label"], f"{100 * e['probability']:.1f} %") for e in found["labels"]]
                parts = card.locator(".scores dt").all()
                assert [(p.locator("span").text_content(), p.locator("b").text_content()) for p in parts] == expected
            else:
                expected = [s["text"] + s["label"] for s in found["spans"]]
                assert card.locator("mark").all_text_contents() == expected
        assert page.is_hidden("#play-max") and TOKENIZER(text)["input_ids"]
        until(page, "document.querySelector('#mix .legend').textContent.includes('1')")
        page.locator("#prompts button", has_text=re.compile("^Pin$")).first.click()
        until(page, "document.querySelector('#prompts .tier').textContent === 'device, pinned'")
