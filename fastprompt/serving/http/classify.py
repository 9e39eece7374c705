"""`/v1/classify` and `/v1/token-classify`: labels of texts, and of the words in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Request
from pydantic import Field, model_validator
from starlette.responses import JSONResponse, Response

from fastprompt.errors import UnsupportedError
from fastprompt.serving import tagging
from fastprompt.serving.encoders import Answer, EncoderEngine
from fastprompt.serving.http import embeddings
from fastprompt.serving.http.body import Items, StrictRoute
from fastprompt.serving.http.encoder_body import (
    InputFields,
    ModelFields,
    Text,
    charged,
    check_count,
    encoder_of,
    usage,
)
from fastprompt.serving.http.state import find_prompt, need_ready
from fastprompt.serving.tagging import Word

router = APIRouter(tags=["encoders"], route_class=StrictRoute, dependencies=[Depends(need_ready)])
ENCODER_ROUTERS = (router, embeddings.router)

_JSON: dict[str, Any] = {"response_class": Response, "responses": {200: {"content": {"application/json": {}}}}}
_Words = Annotated[Items[Text], Field(min_length=1)]


class ClassifyRequest(InputFields):
    """`top_k` labels of each text, the most probable first (all by default), with `raw_logits` in the labels' order."""

    top_k: Annotated[int, Field(ge=1)] | None = None
    raw_logits: bool = False


class TokenClassifyRequest(ModelFields):
    """One text or several, or the words of one or of several."""

    input: Text | Annotated[Items[Text], Field(min_length=1)] | None = None
    words: _Words | Annotated[Items[_Words], Field(min_length=1)] | None = None
    raw_logits: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenClassifyRequest:
        if (self.input is None) == (self.words is None):
            raise ValueError("expected either input or words")
        return self


@router.post("/v1/classify", **_JSON)
async def classify(body: ClassifyRequest, request: Request) -> Response:
    """Label texts under the prompt that `model` names, with its own head and labels."""
    engine, prompt = encoder_of(request), find_prompt(request, body.model)
    _need(engine, "sequence", "/v1/classify")
    ids = await body.ids(engine, prompt)
    with charged(request, sum(map(len, ids))):
        answer = await engine.classify(ids, prompt)
    data = [
        {"object": "classification", "index": i} | _label(logits, answer, body.top_k, body.raw_logits)
        for i, logits in enumerate(answer.values)
    ]
    return _reply(body.model, data, answer)


@router.post("/v1/token-classify", **_JSON)
async def token_classify(body: TokenClassifyRequest, request: Request) -> Response:
    """Label the words of texts by their first tokens; IOB labels make spans. `start` and `end` count characters."""
    engine, prompt = encoder_of(request), find_prompt(request, body.model)
    _need(engine, "token", "/v1/token-classify")
    tagging.need_fast(engine.tokenizer)
    texts, places = _texts(body)
    encoded = [encoding for part in await engine.encode(texts) for encoding in part.encodings]
    words = [
        tagging.found_words(e, text) if place is None else tagging.given_words(e, place)
        for e, text, place in zip(encoded, texts, places, strict=True)
    ]
    with charged(request, sum(len(e.ids) for e in encoded)):
        answer = await engine.classify([e.ids for e in encoded], prompt)
    data = [
        {"object": "token_classification", "index": i}
        | _tagged(text, own, logits[[word.token for word in own]], answer, body.raw_logits)
        for i, (text, own, logits) in enumerate(zip(texts, words, answer.values, strict=True))
    ]
    return _reply(body.model, data, answer)


def _need(engine: EncoderEngine, task: str, route: str) -> None:
    if engine.task != task:
        answers = {"sequence": "/v1/classify", "token": "/v1/token-classify", "embedding": "/v1/embeddings"}
        raise UnsupportedError(f"{engine.name} does not answer {route}: use {answers[engine.task]}")


def _texts(body: TokenClassifyRequest) -> tuple[list[str], list[list[tuple[int, int]] | None]]:
    """Texts, and where their words stand if those were given."""
    if body.input is not None:
        texts = [body.input] if isinstance(body.input, str) else body.input
        check_count(len(texts), "input")
        return texts, [None] * len(texts)
    given: Any = body.words
    lists = [given] if isinstance(given[0], str) else given
    check_count(len(lists), "words")
    joined = [tagging.join(words) for words in lists]
    return [text for text, _ in joined], [places for _, places in joined]


def _label(logits: np.ndarray, answer: Answer, top_k: int | None, raw: bool) -> dict[str, Any]:
    scores = tagging.probabilities(logits, answer.activation)
    best = [int(i) for i in np.argsort(-scores, kind="stable")[:top_k]]
    found: dict[str, Any] = {
        "label": answer.labels[best[0]],
        "labels": [{"label": answer.labels[i], _score(answer): float(scores[i])} for i in best],
    }
    return found | ({"logits": logits.tolist(), "classes": list(answer.labels)} if raw else {})


def _tagged(text: str, words: Sequence[Word], logits: np.ndarray, answer: Answer, raw: bool) -> dict[str, Any]:
    """Words with their labels, and spans with the mean probability of their words."""
    scores = tagging.probabilities(logits, answer.activation)
    best, key = scores.argmax(-1), _score(answer)
    labels = [answer.labels[i] for i in best]
    shown = [
        {"word": text[w.start : w.end], "start": w.start, "end": w.end, "label": label, key: float(own[i])}
        | ({"logits": values.tolist()} if raw else {})
        for w, label, own, i, values in zip(words, labels, scores, best, logits, strict=True)
    ]
    marked = []
    for span in tagging.spans(labels):
        start, end = words[span.first].start, words[span.last].end
        mean = float(np.mean([scores[w, best[w]] for w in range(span.first, span.last + 1)]))
        place = {"first_word": span.first, "last_word": span.last, "start": start, "end": end}
        marked.append({"label": span.label, "text": text[start:end], key: mean} | place)
    return {"words": shown, "spans": marked} | ({"classes": list(answer.labels)} if raw else {})


def _score(answer: Answer) -> str:
    return "value" if answer.activation == "none" else "probability"


def _reply(model: str, data: list[dict[str, Any]], answer: Answer) -> Response:
    content = {"object": "list", "model": model, "version": answer.version, "data": data, "usage": usage(answer.tokens)}
    return JSONResponse(content)
