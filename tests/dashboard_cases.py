"""What the dashboard's tests serve, and the pages that watch it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serving.http.conftest import Port
from serving.http.fakes import SPEC, TEMPLATE, FakeEngine, prompt_files, write_prompt

from fastprompt import demo
from fastprompt.serving.http import Access, create_app
from fastprompt.serving.registry import PromptRegistry

ADMIN, USER = "admin-key-0123456789", "user-key-0123456789"
EVIL = ["<img src=x onerror=alert(1)>", "<script>alert(1)", "\"'><svg onload=alert(1)>", "__proto__", "constructor"]
WAIT = 120_000  # milliseconds: the machine may be busy
NAMES = [*EVIL, *(f"tenant-{i:02d}" for i in range(30))]


def text_engine(folder: Path, **options: Any) -> FakeEngine:
    """The fake engine over all of `NAMES`."""
    made = prompt_files(folder / "made")
    for name in NAMES:
        write_prompt(folder / "prompts" / name, made)
    tokenizer = demo.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return FakeEngine(tokenizer, PromptRegistry(folder / "prompts", SPEC), **options)


class Watched:
    """A page, what went wrong on it and which hosts it asked."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.wrong: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("dialog", self._alert)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda m: self.wrong.append(m.text) if "Content Security Policy" in m.text else None)
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.url = url
        self.page.goto(url)

    def _alert(self, dialog: Any) -> None:
        self.wrong.append(f"alert: {dialog.message}")
        dialog.dismiss()

    def check(self) -> None:
        """Nothing may have gone wrong."""
        pictures = self.page.evaluate("[...document.images].map((i) => i.getAttribute('src'))")
        assert not self.wrong and pictures == ["/static/icon.svg"] and self.hosts == {self.url.split("/")[2]}


@contextmanager
def watched(browser: Any, engine: Any, access: Access | None = None, **options: Any) -> Iterator[tuple[Any, Port]]:
    with Port(create_app(engine, access)) as port:
        seen = Watched(browser, port.url, **options)
        try:
            yield seen.page, port
            seen.check()
        finally:
            seen.context.close()


def until(page: Any, condition: str) -> None:
    """Wait for a condition in JavaScript; Playwright's own way evaluates strings in the page, which it forbids."""
    end = time.monotonic() + WAIT / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(30)


def names_of(page: Any) -> list[str]:
    page.wait_for_selector("#prompts tbody tr")
    return page.locator("#prompts td.name").all_text_contents()
