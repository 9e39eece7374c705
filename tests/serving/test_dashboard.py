"""The dashboard: what is served, and what a browser makes of it."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
from encoder_tools import TOKENIZER, classifier, tagger
from encoder_tools import engine as encoder_engine
from serving.http.conftest import Port
from serving.http.fakes import SPEC, TEMPLATE, FakeEngine, prompt_files, write_prompt
from starlette.testclient import TestClient

from fastprompt import demo
from fastprompt.serving.http import Access, create_app
from fastprompt.serving.registry import PromptRegistry
from fastprompt.store import save_prompt

ADMIN, USER = "admin-key-0123456789", "user-key-0123456789"
EVIL = ["<img src=x onerror=alert(1)>", "<script>alert(1)", "\"'><svg onload=alert(1)>", "__proto__", "constructor"]
NAMES = [*EVIL, *(f"tenant-{i:02d}" for i in range(30))]
STATIC = files("fastprompt.serving.http").joinpath("static")
WAIT = 120_000  # milliseconds: the machine may be busy


def sources(kind: str) -> dict[str, str]:
    return {entry.name: entry.read_text() for entry in STATIC.iterdir() if entry.name.endswith(kind)}


def text_engine(folder: Path, **options: Any) -> FakeEngine:
    made = prompt_files(folder / "made")
    for name in NAMES:
        write_prompt(folder / "prompts" / name, made)
    tokenizer = demo.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return FakeEngine(tokenizer, PromptRegistry(folder / "prompts", SPEC), **options)


# without a browser ---------------------------------------------------------------------------------------------------


def test_the_page_may_load_nothing_from_elsewhere(tmp_path: Path):
    with TestClient(create_app(text_engine(tmp_path))) as client:
        reply = client.get("/")
        policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
        assert reply.headers["content-type"].startswith("text/html")
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'" and policy["require-trusted-types-for"] == "'script'"
        assert "unsafe" not in reply.headers["content-security-policy"]
        assert reply.headers["x-content-type-options"] == "nosniff"
        for path in re.findall(r'(?:src|href)="(/[^"]+)"', reply.text):
            asset = client.get(path)
            assert asset.status_code == 200 and asset.headers["x-content-type-options"] == "nosniff"
            again = client.get(path, headers={"If-None-Match": asset.headers["etag"]})
            assert again.status_code == 304 and not again.content
        for name in sources(".js"):
            assert client.get(f"/static/{name}").headers["content-type"].startswith("text/javascript")
        for path in ("/static/absent.js", "/static/..%2fdashboard.py", "/static/__init__.py", "/static/"):
            assert client.get(path).status_code == 404


def test_no_inline_code_no_markup_from_strings_and_no_foreign_address():
    page = sources(".html")["index.html"]
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", page)
    for name, source in {**sources(".js"), **sources(".html"), **sources(".css")}.items():
        used = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|DOMParser"
        assert not re.search(used, source), name
        assert set(re.findall(r"https?://[^\s\"')]+", source)) <= {"http://www.w3.org/2000/svg"}, name
    for name in re.findall(r'from "\./([^"]+)"', "".join(sources(".js").values())):
        assert name in sources(".js")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_texts_and_marks_stand_out_in_both_themes():
    """At least as WCAG 2.2 asks for: 4.5 for text, 3 for marks that carry meaning."""
    blocks = re.findall(r"\{([^{}]*--page:[^{}]*)\}", sources(".css")["style.css"])
    themes = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in blocks]
    assert len(themes) == 3 and themes[1] == themes[2] and len(themes[0]) == len(themes[1])
    for theme in themes[:2]:
        for text in ("ink", "soft", "bad", "good", "warn"):
            assert contrast(theme[text], theme["card"]) >= 4.5, (text, theme)
        assert contrast(theme["soft"], theme["page"]) >= 4.5
        assert contrast(theme["accent-ink"], theme["accent"]) >= 4.5
        assert contrast(theme["bad"], theme["bad-soft"]) >= 4.5
        for i in range(9):
            assert contrast(theme[f"s{i}"], theme["card"]) >= 3.0, (i, theme)


def test_the_page_is_open_and_what_it_asks_is_not(tmp_path: Path):
    access = Access(api_keys=[USER], admin_keys=[ADMIN])
    with TestClient(create_app(text_engine(tmp_path), access)) as client:
        assert client.get("/").status_code == client.get("/static/app.js").status_code == 200
        assert client.get("/v1/dashboard").status_code == 401
        asked = {
            key: client.get("/v1/dashboard", headers={"Authorization": f"Bearer {key}"}).json() for key in (USER, ADMIN)
        }
    expected = {"model": "backbone", "task": "text", "chat": True, "keys": True, "pins": True}
    assert asked == {USER: expected | {"admin": False}, ADMIN: expected | {"admin": True}}


# in a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium is installed: apt install chromium")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"], timeout=WAIT)
        yield launched
        launched.close()


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


def test_names_are_text_wherever_they_appear(browser: Any, tmp_path: Path):
    engine = text_engine(tmp_path, active={str(i): name for i, name in enumerate([None, *EVIL])})
    with watched(browser, engine) as (page, _):
        listed = names_of(page)
        assert set(EVIL) <= set(listed) and len(listed) == 25
        page.wait_for_selector("#mix .legend li:nth-child(6)")
        assert set(page.locator("#mix .legend .name").all_text_contents()) == {"backbone", *EVIL}
        for name in EVIL:
            page.get_by_role("button", name=f"Try in the playground: {name}", exact=True).click()
        assert set(EVIL) <= set(page.locator("#play-chips .chip span").all_text_contents())
        page.fill("#play-text", "<img src=x onerror=alert(2)>")
        page.fill("#play-max", "3")
        page.click("#play-run")
        until(page, "document.querySelectorAll('.result .out:not(.running)').length === 6")
        assert set(EVIL) <= set(page.locator(".result h3").all_text_contents())
        row = page.locator("#prompts tr", has_text=EVIL[0])
        assert row.locator("[data-count=running]").text_content() == "1"
        row.get_by_role("button", name="Delete").click()
        assert page.text_content("#delete-name") == EVIL[0]
        page.get_by_role("button", name="Keep", exact=True).click()
        row.get_by_role("button", name="Load and keep").click()
        until(page, "document.querySelector('#toast').textContent.startsWith('<img')")


def test_the_key_opens_what_it_may_and_stays_in_the_tab(browser: Any, tmp_path: Path):
    access = Access(api_keys=[USER], admin_keys=[ADMIN])
    with watched(browser, text_engine(tmp_path), access) as (page, port):
        page.wait_for_selector("#key-dialog[open]")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-wrong:visible")
        page.keyboard.type(USER)
        page.keyboard.press("Enter")
        page.wait_for_selector("#play-chips .chip")
        assert page.is_hidden("#prompts") and page.is_hidden("#tiles")
        page.get_by_role("button", name="Key", exact=True).click()
        page.keyboard.type(ADMIN)
        page.keyboard.press("Enter")
        assert names_of(page)
        assert page.evaluate("JSON.stringify(Object.entries(sessionStorage))") == f'[["fastprompt-key","{ADMIN}"]]'
        assert ADMIN not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
        assert page.input_value("#key-value") == ""
        page.reload()
        assert names_of(page)
        other = page.context.new_page()
        other.goto(port.url)
        other.wait_for_selector("#key-dialog[open]", timeout=WAIT)
        other.close()
        page.get_by_role("button", name="Key", exact=True).click()
        page.get_by_role("button", name="Forget").click()
        page.wait_for_selector("#key-dialog[open]")
        assert page.evaluate("sessionStorage.length") == 0


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


def test_prompts_are_loaded_pinned_found_and_deleted(browser: Any, tmp_path: Path):
    engine = text_engine(tmp_path)
    with watched(browser, engine) as (page, _):
        assert len(names_of(page)) == 25
        page.click("#after")
        until(page, "document.querySelectorAll('#prompts tbody tr').length === 10")
        page.click("#before")
        until(page, "document.querySelectorAll('#prompts tbody tr').length === 25")
        page.fill("#find", "tenant-07")
        until(page, "document.querySelectorAll('#prompts tbody tr').length === 1")
        for button, wanted in (("Pin", "host, pinned"), ("Unpin", "host")):
            page.locator("#prompts button", has_text=re.compile(f"^{button}$")).click()
            until(page, f"document.querySelector('#prompts .tier').textContent === '{wanted}'")
        page.locator("#prompts button", has_text="Unload").click()
        until(page, "document.querySelector('#toast').textContent.includes('leaves memory')")
        assert engine.residency.unloaded == ["tenant-07"]
        page.locator("#prompts button", has_text="Delete").click()
        page.locator("#delete-dialog .danger").click()
        page.wait_for_selector("#prompts-empty:visible")
        assert "tenant-07" not in engine.registry
        made = [str(path) for path in sorted((tmp_path / "made").iterdir())]
        for name, kept in (("tenant-06", True), ("tenant-07", False)):
            if kept:
                page.click("#upload")
            page.fill("#upload-name", name)
            page.set_input_files("#upload-files", made)
            page.locator("#upload-dialog .primary").click()
            page.wait_for_selector("#upload-wrong:visible" if kept else "#prompts tbody tr")
        assert names_of(page) == ["tenant-07"] and "tenant-07" in engine.registry


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_400_pixels_and_follows_the_theme(browser: Any, tmp_path: Path, scheme: str):
    engine = text_engine(tmp_path, active={str(i): name for i, name in enumerate(NAMES)})
    small = {"viewport": {"width": 400, "height": 800}, "color_scheme": scheme}
    with watched(browser, engine, **small) as (page, _):
        names_of(page)
        page.wait_for_selector("#mix .legend li")
        page.fill("#play-text", "x" * 300)
        page.click("#play-run")
        page.wait_for_selector(".result .out")
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        wide = "[...document.querySelectorAll('main *, header *')].filter((e) => e.getBoundingClientRect().right > 401)"
        assert page.evaluate(f"{wide}.map((e) => e.outerHTML.slice(0, 80))") == []
        background = "getComputedStyle(document.body).backgroundColor"
        dark, light = "rgb(15, 17, 21)", "rgb(244, 245, 247)"
        assert page.evaluate(background) == {"light": light, "dark": dark}[scheme]
        for wanted in ("light", "dark"):
            page.click("#theme")
            assert page.evaluate(background) == {"light": light, "dark": dark}[wanted]
        page.reload()
        assert page.evaluate(background) == dark


def test_everything_can_be_reached_and_read_with_the_keyboard(browser: Any, tmp_path: Path):
    engine = text_engine(tmp_path, active={"1": "tenant-01"})
    with watched(browser, engine) as (page, _):
        names_of(page)
        until(page, "document.querySelectorAll('.chart .line').length === 6")
        until(page, "document.querySelectorAll('.chart')[2].querySelector('.l1').getAttribute('d').includes('L')")
        page.evaluate("document.activeElement.blur()")
        reached = []
        for _ in range(25):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert reached[0] == "A" and reached.count("svg") == 3
        order = ["theme", "play-text", "play-name", "play-max", "play-run", "show-all", "find", "upload"]
        assert [i for i in reached if i in order] == order
        page.focus(".chart:nth-child(3) svg")
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector(".chart:nth-child(3) .tip:visible")
        assert "running" in page.get_attribute(".chart:nth-child(3) svg", "aria-label")
        page.keyboard.press("Escape")
        assert page.is_hidden(".chart:nth-child(3) .tip")
        unnamed = "[...document.querySelectorAll('button, input, textarea, svg[role=img]')]" \
            ".filter((e) => !(e.textContent.trim() || e.ariaLabel || e.labels?.length || e.placeholder))"  # fmt: skip
        assert page.evaluate(f"{unnamed}.map((e) => e.outerHTML)") == []
        page.focus("#upload")
        page.keyboard.press("Enter")
        page.wait_for_selector("#upload-dialog[open]")
        page.keyboard.press("Escape")
        page.wait_for_selector("#upload-dialog:not([open])", state="attached")
        assert page.evaluate("document.activeElement.id") == "upload"


def test_a_server_that_goes_away_and_comes_back_is_noticed(browser: Any, tmp_path: Path):
    engine = text_engine(tmp_path)
    with watched(browser, engine) as (page, _):
        page.wait_for_selector("#state.good")
        engine.ready = False
        page.wait_for_selector("#state.warn")
        engine.ready = True
        page.wait_for_selector("#state.good")
        page.context.set_offline(True)
        page.wait_for_selector("#state.bad")
        page.context.set_offline(False)
        page.wait_for_selector("#state.good")


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
