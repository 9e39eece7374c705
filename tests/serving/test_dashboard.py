"""The dashboard as it is served: what the page may load, what it holds, and that it can be read."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from dashboard_cases import ADMIN, USER, text_engine
from starlette.testclient import TestClient

from fastprompt.serving.http import Access, create_app

STATIC = files("fastprompt.serving.http").joinpath("static")


def sources(kind: str) -> dict[str, str]:
    return {entry.name: entry.read_text() for entry in STATIC.iterdir() if entry.name.endswith(kind)}


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
