"""Two process trees, as on two machines: data-parallel engines that read one store and share one secret."""

import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import vllm_cases
from vllm_cases import NAME
from vllm_server import Client, free_port, processes, server_environment, server_of, wait_for

from fastprompt import PrefixTuning, PromptTuning, PTuning

NEW = 6
TEXTS = [(44, 55, 66), (7,), (100, 101, 102, 103) * 10]


@pytest.mark.long
def test_two_engines_answer_alike(tmp_path):
    served = vllm_cases.serve(tmp_path, lengths=())
    configs = (PrefixTuning, PromptTuning, PTuning, PrefixTuning)
    for seed, (config, length) in enumerate(zip(configs, (20, 33, 64, 1), strict=True)):
        served.add(f"a{seed}", config(num_virtual_tokens=length), seed)
    served.export()
    rows = [(name, text) for name in [None, *served.names] for text in TEXTS] * 4
    expected = served.expected(rows, NEW)
    port, ranks = free_port(), ("--data-parallel-size=2", "--data-parallel-size-local=1")
    where = ("--data-parallel-address=127.0.0.1", f"--data-parallel-rpc-port={free_port()}")
    first = server_of(served, port, *ranks, *where)
    second = server_of(served, port, *ranks, *where, "--headless", "--data-parallel-start-rank=1")
    variables, logs = server_environment(), [tmp_path / "first.log", tmp_path / "second.log"]
    nodes = [
        (server.command(), server.environment(variables), log)
        for server, log in zip((first, second), logs, strict=True)
    ]
    with processes(nodes) as started:
        wait_for(port, started, logs)

        def ask(row):
            body = {"model": row[0] or NAME, "prompt": list(row[1]), "max_tokens": NEW, "temperature": 0}
            answer = Client(port).post("/v1/completions", **body, ignore_eos=True, return_token_ids=True)
            assert answer.status == 200, answer
            assert answer["choices"][0]["prompt_token_ids"] == list(row[1])
            return answer["choices"][0]["token_ids"]

        with ThreadPoolExecutor(8) as several:
            assert list(several.map(ask, rows)) == expected
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    done = re.findall(r'vllm:request_success_total\{engine="(\d)".*finished_reason="length".*\} (\d+)', metrics)
    answered = {engine: int(float(count)) for engine, count in done}
    assert len(answered) == 2 and min(answered.values()) > 0 and sum(answered.values()) == len(rows)
