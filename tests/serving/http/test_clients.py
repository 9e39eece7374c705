"""Clients that go away, that read slowly or not at all, that send slowly: none of them holds anything up."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time

import httpx
import pytest
from serving.http.fakes import FakeEngine, expected
from serving.http.test_completions import error, events

from fastprompt.serving.http import Options
from fastprompt.serving.http.rows import Rows
from fastprompt.serving.request import Delta, Generation, SamplingParams, TokenLogprob

ASKED = {"model": "ada", "prompt": [5, 6], "max_tokens": 400}
LONG = ASKED | {"stream": True, "n": 60, "logprobs": 20, "max_tokens": 300}  # far more than sockets hold
PATIENCE = 300.0  # seconds: far more than anything takes


def until(true) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def connect(port, body: dict, *, window: int | None = None) -> socket.socket:
    """A request sent by hand."""
    made = socket.socket()
    if window is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    made.settimeout(PATIENCE)
    made.connect(("127.0.0.1", port.number))
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    )
    made.sendall(head.encode() + b"\r\n\r\n" + content)
    return made


@pytest.mark.parametrize("kind", ["application/zip", "multipart/form-data; boundary=b"])
def test_an_upload_that_breaks_off_is_no_fault_of_the_servers(port_of, caplog, kind):
    with port_of() as port:
        client = socket.create_connection(("127.0.0.1", port.number))
        head = f"PUT /v1/prompts/it HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: 1000\r\n\r\n--b\r\n"
        client.sendall(head.encode())
        until(lambda: port.app.state.server.active)
        client.close()
        until(lambda: 'method="PUT"' in httpx.get(f"{port.url}/metrics").text)
        counted = re.findall(
            r'http_requests_total{method="PUT".*status="(\d+)"}', httpx.get(f"{port.url}/metrics").text
        )
    assert counted == ["400"] and "an answer failed" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [[5, 6], [[5], [6], [7]]], ids=["one", "three"])
def test_a_client_that_goes_away_takes_its_rows_with_it(port_of, engine, stream, prompt):
    engine.pause = 0.01
    with port_of() as port:
        client = connect(port, ASKED | {"stream": stream, "prompt": prompt})
        until(lambda: len(engine.active) == (1 if prompt == [5, 6] else 3))
        if stream:
            client.recv(2000)
        client.close()
        until(lambda: not engine.active)
        until(lambda: port.app.state.server.active == 0)
        assert len(engine.cancelled) == (1 if prompt == [5, 6] else 3)


def test_a_client_that_goes_away_before_its_first_token(port_of, engine):
    engine.gate = asyncio.Event()
    with port_of() as port:
        client = connect(port, ASKED | {"stream": True})
        until(lambda: engine.active)
        client.close()
        until(lambda: not engine.active)


def test_a_client_that_reads_nothing_holds_up_nobody(port_of, engine, tokenizer):
    """Its answer is far larger than the sockets' buffers; the engine finishes it, and others are answered meanwhile."""
    engine.pause = 0.0
    with port_of(options=Options(stall_seconds=PATIENCE)) as port:
        stuck = connect(port, LONG, window=4096)
        until(lambda: engine.seen)
        answer = httpx.post(f"{port.url}/v1/completions", json=ASKED | {"max_tokens": 5}, timeout=PATIENCE).json()
        want = tokenizer.decode(expected("ada", [5, 6], 5), skip_special_tokens=True)
        assert answer["choices"][0]["text"] == want
        until(lambda: not engine.active)
        assert engine.cancelled == []  # not held up: its rows came to their end
        assert port.app.state.server.active == 1  # what it has not taken waits for it
        stuck.close()
        until(lambda: port.app.state.server.active == 0)


def test_a_client_that_reads_nothing_is_let_go(port_of, engine):
    with port_of(options=Options(stall_seconds=0.5)) as port:
        stuck = connect(port, LONG, window=4096)
        until(lambda: engine.seen and port.app.state.server.active == 0)
        stuck.close()


def test_a_client_that_reads_slowly_gets_everything(port_of, engine, tokenizer):
    with port_of() as port:
        client = connect(port, ASKED | {"stream": True, "n": 20, "logprobs": 5}, window=4096)
        until(lambda: engine.seen and not engine.active)  # the engine is done long before the client
        received = b""
        while b"[DONE]" not in received[-200:]:
            received += client.recv(65536)
        client.close()
    body = b"".join(line for line in received.partition(b"\r\n\r\n")[2].split(b"\r\n") if line.startswith(b"data"))
    texts = [""] * 20
    for line in body.split(b"data: ")[1:-1]:
        for choice in json.loads(line)["choices"]:
            texts[choice["index"]] += choice["text"]
    for index, text in enumerate(texts):
        assert text == tokenizer.decode(expected("ada", [5, 6], 400, index), skip_special_tokens=True)


def test_a_body_that_stops_coming(port_of):
    with port_of(options=Options(stall_seconds=0.2)) as port:
        client = socket.create_connection(("127.0.0.1", port.number), PATIENCE)
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        client.sendall(b'content-length: 1000\r\n\r\n{"model"')
        received = client.recv(65536)
        assert received.startswith(b"HTTP/1.1 408")
        client.close()
        assert httpx.get(f"{port.url}/health").status_code == 200


def test_what_nobody_takes_is_put_together():
    class Fast(FakeEngine):
        async def generate(self, generation):
            for i in range(1000):
                probability = TokenLogprob(i, -1.0)
                yield Delta(i % 2, f"{i} ", (i,), (probability,), "length" if i >= 998 else None)

    async def main() -> None:
        engine = Fast(None, None)
        async with Rows(engine, [Generation([1], None, SamplingParams(n=2))]) as rows:
            await asyncio.sleep(0.05)
            taken = [delta async for news in rows for _, delta in news]
        assert len(taken) == 2
        for delta in taken:
            want = list(range(delta.index, 1000, 2))
            assert delta.text == "".join(f"{i} " for i in want) and list(delta.tokens) == want
            assert [p.token for p in delta.logprobs] == want and delta.finish_reason == "length"

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_rows_that_the_engine_ends(client, engine, stream):
    async def aborted(generation):
        yield Delta(0, "some", (5,))
        yield Delta(0, "", (), (), "abort")

    engine.generate = aborted
    response = client.post("/v1/completions", json=ASKED | {"stream": stream})
    if stream and response.status_code == 200:
        lines = [line for line in response.text.split("\n\n") if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "aborted"
    else:
        assert error(response, 503)["code"] == "aborted"


def test_pipelined_requests_are_answered_in_order(port_of):
    with port_of() as port:
        body = json.dumps(ASKED | {"max_tokens": 2}).encode()
        one = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        one += f"content-length: {len(body)}\r\n\r\n".encode() + body
        client = socket.create_connection(("127.0.0.1", port.number), PATIENCE)
        client.sendall(one * 3)
        received = b""
        while received.count(b"HTTP/1.1 200") < 3:
            received += client.recv(65536)
        client.close()


def test_streams_over_one_connection(port_of):
    with port_of() as port, httpx.Client(timeout=PATIENCE) as client:
        for _ in range(3):
            answer = client.post(f"{port.url}/v1/completions", json=ASKED | {"max_tokens": 3, "stream": True})
            assert len(events(answer.text)) >= 1
