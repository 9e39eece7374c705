"""Errors as OpenAI's clients expect them: a status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import errno
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from fastprompt.errors import (
    ArgumentError,
    BankFullError,
    ConflictError,
    FastPromptError,
    IncompatiblePromptError,
    PromptFileError,
    PromptNotFoundError,
    UnsupportedError,
)
from fastprompt.serving.request import OverloadedError, RowFailedError

log = logging.getLogger("fastprompt.serving")

SHOWN_PROBLEMS = 5
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "request_too_large"}


class ApiError(FastPromptError):
    """An answer other than success: `status`, what is said, the `param` at fault and a `code` for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be answered as it is."""
    return ApiError(400, message, code=code or "invalid_value", param=param)


def denied() -> ApiError:
    """A key that is not an administrator's."""
    return ApiError(403, "This key may not administer prompts: use an admin key.", code="permission_denied")


def not_found(name: str | None = None) -> ApiError:
    """What is said of a name that is not there, and of one that this caller may not use."""
    named = "" if name is None else f" {name[:200]!r}"
    said = f"The model{named} does not exist or you do not have access to it."
    return ApiError(404, said, code="model_not_found", param="model")


def unavailable(why: str) -> ApiError:
    """A server that cannot answer now, though it may soon."""
    return ApiError(503, f"{why}: try again later", code="unavailable", headers={"Retry-After": "5"})


def _unusable(message: str, code: str) -> ApiError:
    """A prompt that answers nothing until an administrator sees to it: OpenAI's clients do not ask again."""
    return ApiError(503, message, code=code, param="model", headers={"x-should-retry": "false"})


def too_many(message: str, seconds: float, code: str = "rate_limit_exceeded") -> ApiError:
    """A request that may come again after `seconds`."""
    return ApiError(429, message, code=code, headers={"Retry-After": str(max(1, math.ceil(min(seconds, 3600.0))))})


def explain(error: Exception) -> ApiError:
    """What a caller is told of an error that happened while answering; not its traceback, nor the server's paths."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientDisconnect):
        return invalid("the request's body broke off", code="incomplete_body")
    if isinstance(error, OverloadedError):
        return too_many(str(error), error.retry_after, "overloaded")
    if isinstance(error, PromptNotFoundError):
        return not_found()
    if isinstance(error, ConflictError):
        return ApiError(412, str(error), code="precondition_failed")
    if isinstance(error, PromptFileError):
        log.error("a stored prompt cannot be read: %s", error)
        return ApiError(503, "this prompt's files cannot be read at present", code="prompt_unreadable", param="model")
    if isinstance(error, BankFullError):
        log.error("a prompt has no room: %s", error)
        return _unusable("the server has no room for this prompt", "prompt_too_large")
    if isinstance(error, RowFailedError):
        log.error("a prompt cannot be used: %s", error)
        return _unusable(str(error), "prompt_unusable")
    if isinstance(error, (ArgumentError, IncompatiblePromptError, UnsupportedError)):
        return invalid(str(error))
    log.error("an answer failed", exc_info=error)
    return ApiError(500, "the server failed to answer this request", code="internal_error")


def explain_upload(error: PromptFileError) -> ApiError:
    """What an administrator is told of files that cannot be stored: theirs are wrong, or the disk is full."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno is not None:
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return ApiError(507 if full else 503, str(error), code="disk_full" if full else "storage_failed")
    return invalid(str(error), code="invalid_prompt")


def reply(error: ApiError) -> Response:
    """The response that carries an error."""
    body = json.dumps(error.body).encode()  # escapes whatever is no valid Unicode
    return Response(body, error.status, {**error.headers, "content-type": "application/json"})


def of_validation(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """Problems that pydantic found, as one error about the first of them."""
    said = []
    for problem in problems[:SHOWN_PROBLEMS]:
        place = _place(problem["loc"])
        if problem["type"] == "extra_forbidden":
            said.append(f"Unrecognized request argument supplied: {place}")
        elif problem["type"] == "json_invalid":
            return invalid(f"The body is no JSON that can be read: {problem['ctx']['error']}", code="invalid_json")
        else:
            said.append(f"{place}: {problem['msg']}" if place else str(problem["msg"]))
    more = f" (and {len(problems) - SHOWN_PROBLEMS} more)" if len(problems) > SHOWN_PROBLEMS else ""
    return invalid("; ".join(said) + more, _place(problems[0]["loc"]) or None)


def _place(path: Sequence[Any]) -> str:
    named = [str(part) for part in path if part not in ("body", "query", "path", "header")]
    return ".".join(named)[:200]


async def on_api_error(request: Request, error: Exception) -> Response:
    """A handler for every deliberate error."""
    return reply(explain(error))


async def on_invalid(request: Request, error: Exception) -> Response:
    """A handler for requests that do not fit their schema."""
    assert isinstance(error, RequestValidationError)
    return reply(of_validation(error.errors()))


async def on_http_error(request: Request, error: Exception) -> Response:
    """A handler for what the framework refuses."""
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "invalid_request")
    return reply(ApiError(error.status_code, str(error.detail), code=code, headers=error.headers))
