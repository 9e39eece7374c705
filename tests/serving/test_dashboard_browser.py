"""The dashboard in a browser: what it shows, streams, uploads and keeps to itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from dashboard_cases import ADMIN, EVIL, NAMES, USER, WAIT, names_of, text_engine, until, watched

from fastprompt.serving.http import Access


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
