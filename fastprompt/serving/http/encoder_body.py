"""What requests to an encoder share: the model, the texts, and their way to token ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request

from fastprompt.serving.encoders import EncoderEngine
from fastprompt.serving.http.body import Items, Strict, TokenId
from fastprompt.serving.http.errors import invalid
from fastprompt.serving.http.sampling import MAX_NAME
from fastprompt.serving.http.state import caller_of, server_of

MAX_TEXTS = 2048  # as OpenAI's embeddings

Ids = Annotated[Items[TokenId], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[Items[Text], Field(min_length=1)] | Annotated[Items[Ids], Field(min_length=1)]


class ModelFields(Strict):
    """The prompt's name, or the backbone's own; `user` changes nothing."""

    model: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    user: str | None = None


class InputFields(ModelFields):
    """One text or several, as strings or token ids; with `truncate`, strings that are too long are cut at their end."""

    input: Text | Ids | Texts
    truncate: bool = False

    async def ids(self, engine: EncoderEngine, prompt: str | None) -> list[list[int]]:
        """Token ids of each text. Errors: ApiError for too many texts."""
        given: Any = self.input
        texts = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        check_count(len(texts), "input")
        if not isinstance(texts[0], str):
            return texts
        most = max(1, await engine.room(prompt)) if self.truncate else None
        return [ids for part in await engine.encode(texts, most) for ids in part["input_ids"]]


def check_count(count: int, param: str) -> None:
    """Raise ApiError for more texts than a request may have."""
    if count > MAX_TEXTS:
        raise invalid(f"{param} has {count} texts, expected at most {MAX_TEXTS}: split the request", param)


def encoder_of(request: Request) -> EncoderEngine:
    """The engine behind the server, where that is one for encoders."""
    engine: Any = server_of(request).engine
    return engine


@contextmanager
def charged(request: Request, tokens: int) -> Iterator[None]:
    """Count a request's tokens against its key's allowance, unless it fails."""
    limiter = caller_of(request).limiter
    taken = limiter.take_tokens(tokens, 0)
    try:
        yield
    except BaseException:
        limiter.settle(taken, 0)
        raise


def usage(tokens: int) -> dict[str, int]:
    """The texts' own tokens; virtual ones are not counted."""
    return {"prompt_tokens": tokens, "total_tokens": tokens}
