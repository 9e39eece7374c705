"""Where a request goes and what may be done with it, from its method, path and body."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

ANSWERS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/classify", "/v1/token-classify", "/v1/embeddings"})
_NAMED = ("/v1/prompts/", "/v1/models/")
_SEED_BITS = 63


@dataclass(frozen=True)
class Route:
    """What a request allows.

    `key` is the prompt's name, which servers are chosen by; empty where any will do. `repeat`: it may be sent again
    while none of its answer was passed on. `resume`: a second answer is the same text, so that a stream goes on in it.
    """

    key: str
    body: bytes
    repeat: bool = True
    resume: bool = False


def route(method: str, path: str, body: bytes, bare: str) -> Route:
    """The route of a request; `bare` is the backbone's own name, under which requests go anywhere.

    Semantics:
        POST /v1/completions {"model": "a", ...}   key "a"; a stream that samples without a seed is given one
        PUT /v1/prompts/a, GET /v1/models/a, ...   key "a"; what writes is sent once
        anything else                              key ""
    """
    if method == "POST" and path in ANSWERS:
        return _of_answer(body, bare)
    prefix = next((prefix for prefix in _NAMED if path.startswith(prefix)), None)
    name = "" if prefix is None else unquote(path[len(prefix) :].partition("/")[0])
    return Route("" if name == bare else name, body, repeat=method not in ("PUT", "DELETE"))


def _of_answer(body: bytes, bare: str) -> Route:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return Route("", body)  # whoever gets it says what is wrong with it
    if not isinstance(fields, dict) or not isinstance(model := fields.get("model"), str):
        return Route("", body)
    found = Route("" if model == bare else model, body)
    # log-probabilities belong to tokens, whose bounds a stream's text does not tell
    logprobs = fields.get("logprobs")
    if fields.get("stream") is not True or not (logprobs is None or logprobs is False):
        return found
    if fields.get("temperature") == 0 or fields.get("seed") is not None:
        return replace(found, resume=True)
    if _several_texts(fields.get("prompt")):  # equal texts of one request would draw equal numbers
        return found
    seed = random.SystemRandom().getrandbits(_SEED_BITS)
    return replace(found, body=json.dumps(fields | {"seed": seed}).encode(), resume=True)


def _several_texts(prompt: Any) -> bool:
    return isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
