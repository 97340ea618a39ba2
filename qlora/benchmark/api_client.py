"""Clients of `inference_qlora.py --serve`, as many at a time as wanted."""

import contextlib
import http.client
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from qlora.arguments import in_repository


@contextlib.contextmanager
def running_server(*flags: str) -> Iterator[str]:
    """The address of `inference_qlora.py --serve` in a process of its own, so that the clients do not slow it down."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [sys.executable, in_repository("inference_qlora.py"), "--serve", "--port", str(port), *flags]
    environment = {name: value for name, value in os.environ.items() if name != "QLORA_API_KEY"}
    server, address = subprocess.Popen(command, env=environment), f"127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://{address}/health")
                break
            if server.poll() is not None:
                raise SystemExit("error: inference_qlora.py --serve failed, see above.")
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


def ask_all(address: str, prompts: list[str], clients: int, requests: int, most_tokens: int) -> dict:
    """Figures of `clients` at a time, each of which sends so many requests, one after the other."""

    def converse(client: int) -> list[tuple[float, int]]:
        numbers = range(client * requests, (client + 1) * requests)
        return [ask(address, prompts[number % len(prompts)], most_tokens) for number in numbers]

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for answers in pool.map(converse, range(clients)) for answer in answers]
    seconds = time.perf_counter() - started
    first_tokens = sorted(first for first, _ in answers)
    return {
        "requests_per_second": round(len(answers) / seconds, 2),
        "tokens_per_second": round(sum(tokens for _, tokens in answers) / seconds),
        "first_token_median_seconds": round(statistics.median(first_tokens), 3),
        "first_token_p95_seconds": round(first_tokens[math.ceil(0.95 * len(first_tokens)) - 1], 3),
    }


def ask(address: str, prompt: str, most_tokens: int) -> tuple[float, int]:
    """Seconds until the first token of a streamed answer arrives, and the number of its tokens."""
    body = {"model": "adapter", "prompt": prompt, "max_tokens": most_tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    started, first = time.perf_counter(), 0.0
    with contextlib.closing(http.client.HTTPConnection(address)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body))
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - started
                chunk = json.loads(line.removeprefix(b"data: "))
    if "usage" not in chunk:
        raise SystemExit(f"error: an answer ended with {chunk}")
    return first, chunk["usage"]["completion_tokens"]  # of the last chunk
