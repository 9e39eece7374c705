"""JSON bodies, read strictly: no NaN, no Infinity, no half characters, no endless nesting."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from json import JSONDecodeError
from typing import Annotated, Any, TypeVar

from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

MAX_FIELDS = 128  # of one object


class Strict(BaseModel):
    """A part of a body: unknown fields, numbers in strings and numbers that are none are refused, as OpenAI does."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        """Each unknown field is a problem of its own: a million of them would take seconds to list."""
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise ValueError(f"{len(data)} fields came, expected at most {MAX_FIELDS}")
        return data


class StrictRequest(Request):
    """A request whose JSON is read by `from_json`."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            return from_json(body, allow_inf_nan=False, cache_strings="keys")
        except ValueError as error:
            raise JSONDecodeError(str(error), "", 0) from None  # which the framework reports as a problem of the body


class StrictRoute(APIRoute):
    """A route that reads its body strictly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


T = TypeVar("T")
Items = Annotated[list[T], Field(fail_fast=True)]  # one problem is told, not a million
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
