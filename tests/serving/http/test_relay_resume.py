"""A stream that goes on at another server: every text comes once, or not at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving.http.streams import events, joined

from fastprompt.serving.http.stream import DONE, event_of
from fastprompt.serving.relay.resume import Continuation, DivergedError


@given(st.data())
def test_whatever_the_chunks_the_text_comes_once(data):
    """Two choices, cut at random in each answer, broken off anywhere."""
    texts = data.draw(st.lists(st.text("abä", max_size=12), min_size=1, max_size=2))
    chat = data.draw(st.booleans())

    def answer(name):
        made = []
        for index, text in enumerate(texts):
            cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
            pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            if chat:
                made.append((index, {"role": "assistant", "content": ""}, None))
            for i, piece in enumerate(pieces):
                made.append((index, {"content": piece}, "stop" if i == len(pieces) - 1 else None))
        found = [
            event_of(
                {
                    "id": name,
                    "created": 1,
                    "choices": [
                        {"index": i, "finish_reason": end} | ({"delta": part} if chat else {"text": part["content"]})
                    ],
                }
            )
            for i, part, end in made
        ]
        return [*found, event_of({"id": name, "created": 1, "choices": [], "usage": {}}), DONE]

    state, out = Continuation(), b""
    for attempt in range(data.draw(st.integers(0, 3))):
        whole = answer(f"try{attempt}")
        for event in whole[: data.draw(st.integers(0, len(whole)))]:
            out += state.take(event)
        state.again()
    out += state.take(b"".join(answer("last")))
    assert joined(events(out.decode())) == dict(enumerate(texts))


def test_another_text_is_not_glued_to_what_was_passed_on():
    def chunk(text, end=None):
        part = {"index": 0, "text": text, "finish_reason": end}
        return event_of({"id": "x", "created": 1, "choices": [part]})

    for second in (chunk("abX"), chunk("ab", "stop"), chunk("b")):
        state = Continuation()
        assert state.take(chunk("abc")) == chunk("abc")
        state.again()
        with pytest.raises(DivergedError):
            state.take(second)
