"""An ASGI application as an iterator of messages, which can cross to another process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.types import ASGIApp, Message, Scope


async def messages_of(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
    """What an application sends in answer to one request: lists of the messages that there are at the time.

    Leaving the iterator early ends the application's task, as a client that goes away does.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    request = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if request:
            return request.pop()
        return await asyncio.get_running_loop().create_future()  # until the task is cancelled

    async def send(message: Message) -> None:
        sent.put_nowait(message)

    task = asyncio.ensure_future(app(dict(scope), receive, send))
    task.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        ended = False
        while not ended:
            found = [await sent.get()]
            while not sent.empty():
                found.append(sent.get_nowait())
            ended = found[-1] is None
            if messages := [message for message in found if message is not None]:
                yield messages
        task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
