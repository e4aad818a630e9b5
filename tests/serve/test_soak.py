"""Thousands of small requests of every kind: the server keeps its size, and answers the last as it did the first."""

import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.serve.conftest import BODY, RUNNING

REQUESTS, ROUNDS = 1200, 4  # each round; the first warms up
MORE = 4 * 2**20  # bytes that all later rounds together may add


def resident(process):
    """Bytes of memory that the process holds now."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[1]) * 1024


def threads(process):
    return len(list(Path(f"/proc/{process.pid}/task").iterdir()))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thousands_of_requests_and_no_more_memory(server):
    good = {"prompt": "def f(", "max_tokens": 4, "temperature": 0}
    chat = {"messages": [{"role": "user", "content": "class A"}], "max_tokens": 3, "temperature": 0.8, "seed": 1}

    def left(number):
        data = json.dumps(good | {"max_tokens": 200, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as wire:
            wire.sendall(f"{head}Authorization: Bearer {server.key}\r\n\r\n".encode() + data)
            wire.recv(100)

    def one(number):
        kind = number % 8
        if kind == 7:
            return left(number)
        path, body, status = [
            ("/v1/completions", good | {"prompt": f"x{number} = "}, 200),
            ("/v1/chat/completions", chat, 200),
            ("/v1/completions", good | {"stream": True, "stop": ["("]}, 200),
            ("/v1/completions", good | {"temperature": -1}, 400),
            ("/v1/completions", good | {"prompt": "y" * BODY}, 413),
            ("/v1/chat/completions", chat | {"stream": True}, 200),
            ("/v1/completions", good | {"prompt": [5] * 511, "max_tokens": 5}, 400),
        ][kind]
        assert server.ask(path, body)[0] == status
        return None

    first = server.ask("/v1/completions", good)[1]["choices"][0]["text"]
    sizes = []
    for _ in range(ROUNDS):
        with ThreadPoolExecutor(RUNNING) as together:
            list(together.map(one, range(REQUESTS)))
        while server.metric("moerunner_requests_running") + server.metric("moerunner_requests_waiting"):
            time.sleep(0.1)
        sizes.append((resident(server.process), threads(server.process)))
    assert server.ask("/v1/completions", good)[1]["choices"][0]["text"] == first
    assert sizes[-1][0] - sizes[0][0] < MORE, sizes
    assert sizes[-1][1] <= sizes[0][1] + 2, sizes
    print(sizes)
