"""`/v1/embeddings`: texts as vectors, in OpenAI's form."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from fastprompt.serving.encoder_rows import Pooling
from fastprompt.serving.http.body import StrictRoute
from fastprompt.serving.http.encoder_body import InputFields, charged, encoder_of, usage
from fastprompt.serving.http.errors import invalid
from fastprompt.serving.http.state import find_prompt, need_ready

router = APIRouter(tags=["encoders"], route_class=StrictRoute, dependencies=[Depends(need_ready)])


class EmbeddingRequest(InputFields):
    """OpenAI's fields, and how token vectors become one: `pooling`, and `normalize` to length 1."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    pooling: Literal["mean", "cls", "last"] = "mean"
    normalize: bool = True


@router.post("/v1/embeddings", response_class=Response, responses={200: {"content": {"application/json": {}}}})
async def embed(body: EmbeddingRequest, request: Request) -> Response:
    """Vectors of texts under the prompt that `model` names; base64 is of little-endian float32."""
    engine, prompt = encoder_of(request), find_prompt(request, body.model)
    if body.dimensions is not None:
        raise invalid("dimensions is not supported: vectors are as wide as the backbone", "dimensions")
    ids = await body.ids(engine, prompt)
    with charged(request, sum(map(len, ids))):
        answer = await engine.embed(ids, prompt, Pooling(body.pooling, body.normalize))
    coded = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": i, "embedding": _base64(vector) if coded else vector.tolist()}
        for i, vector in enumerate(answer.values)
    ]
    content: dict[str, Any] = {"object": "list", "data": data, "model": body.model, "usage": usage(answer.tokens)}
    return JSONResponse(content)


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
