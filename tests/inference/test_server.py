"""qlora/inference/server.py and what it uses, by OpenAI's own client against a running server with a tiny model."""

import contextlib
import http.client
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from api_server import client_of, openai, running, uvicorn
from conftest import add_random_lora

from chatglm.chat import build_prompt, clean_response
from glm_shared.chat import Prompt
from qlora.adapter import load_adapters
from qlora.arguments import InferenceArguments
from qlora.inference import server as server_module
from qlora.inference.decoding import make_sampler
from qlora.inference.generation import generate_answers
from qlora.inference.server import Server, build_app, make_completer
from qlora.inference.slots import Slots
from qlora.inference.web_guard import LARGEST_BODY
from qlora.layers.replacement import replace_layers
from qlora.loading import load_quantized_model

KEY = "open sesame"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
MODELS = ["base", "red", "checkpoint-1.5"]
SLOTS, TOKENS = 16, 10


@pytest.fixture(scope="module")
def adapters(varied_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters, for different layers."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, layers in zip(MODELS[1:], (["query_key_value"], ["query_key_value", "dense"]), strict=True):
        model = load_quantized_model(str(varied_checkpoint), torch.float32)
        add_random_lora(model, layers, std=0.3).save_pretrained(folder / name)
    return [str(folder / name) for name in MODELS[1:]]


def load(checkpoint: Path, adapters: list[str]):
    model = load_adapters(load_quantized_model(str(checkpoint), torch.float32), adapters).eval()
    replace_layers(model, for_training=False)
    return model


@pytest.fixture(scope="module")
def served(varied_checkpoint, adapters, tokenizer) -> Iterator[SimpleNamespace]:
    """A server with a key, its address, and what answers in it."""
    args = InferenceArguments(serve=True, adapter_path=adapters, batch_size=SLOTS, top_k=0, max_new_tokens=16)
    completer = make_completer(load(varied_checkpoint, adapters), tokenizer, args)
    with running(build_app(completer, KEY)) as address:
        yield SimpleNamespace(address=address, completer=completer, batcher=completer.batcher)


@pytest.fixture
def client(served) -> Iterator[openai.OpenAI]:
    with client_of(served.address, KEY) as client:
        yield client


def request(
    address: str, path: str, body: bytes | Iterable[bytes] | None = None, headers: dict[str, str] | None = None
) -> tuple[int, str]:
    """Status and body of the response to a request that OpenAI's client would not send."""
    with contextlib.closing(http.client.HTTPConnection(address, timeout=10)) as connection:
        connection.request("GET" if body is None else "POST", path, body, AUTHORIZED if headers is None else headers)
        response = connection.getresponse()
        return response.status, response.read().decode()


def complete(client: openai.OpenAI, prompt: str, **options):
    return client.completions.create(**{"model": "base", "prompt": prompt, "max_tokens": TOKENS} | options)


def until(condition: Callable[[], bool], seconds: float = 5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# Answers.


def test_64_clients_get_the_answers_that_each_would_get_alone(
    served, client, sample_rows, varied_checkpoint, adapters, tokenizer
):
    prompts = [row["instruction"] for row in (sample_rows * 2)[:64]]
    models = [load(varied_checkpoint, [path] if path else []) for path in (None, *adapters)]
    sampler = make_sampler(do_sample=False)
    expected = [
        generate_answers(models[i % 3], tokenizer, [Prompt(prompt)], TOKENS, sampler, 1)[0]
        for i, prompt in enumerate(prompts)
    ]
    assert len(set(expected)) > 55

    def ask(i: int) -> tuple[str, str]:
        found = complete(client, prompts[i], model=MODELS[i % 3])
        return found.choices[0].text, found.choices[0].finish_reason

    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(ask, range(64)))
    assert [text for text, _ in found] == expected
    assert {reason for _, reason in found} <= {"stop", "length"}
    assert not served.batcher.running and not served.batcher.waiting


def test_conversation_is_the_official_prompt(served, client):
    task = []
    original = served.completer.task
    served.completer.task = lambda form, prompt: task.append(prompt) or original(form, prompt)
    messages = [
        {"role": "system", "content": "你是裁缝。"},
        {"role": "system", "content": " "},
        {"role": "user", "content": [{"type": "text", "text": "裙"}, {"type": "text", "text": "子"}]},
        {"role": "assistant", "content": "白裙。"},
        {"role": "user", "content": "裤"},
    ]
    try:
        reply = client.chat.completions.create(model="red", messages=messages, max_completion_tokens=5)
    finally:
        served.completer.task = original
    assert task == [Prompt("裤", [("裙子", "白裙。")], "你是裁缝。")]
    prompt = build_prompt("裤", [("你是裁缝。\n裙子", "白裙。")])
    assert reply.choices[0].message.role == "assistant" and reply.model == "red"
    assert reply.choices[0].message.content == complete(client, prompt, model="red", max_tokens=5).choices[0].text


def test_usage_counts_tokens(client, tokenizer):
    usage = complete(client, "裙", max_tokens=3).usage
    prompt = len(tokenizer("裙")["input_ids"])
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, 3, prompt + 3)


def sampled(client: openai.OpenAI, seed: int | None, **options) -> str:
    return complete(client, "裙", temperature=1.5, top_p=1.0, seed=seed, max_tokens=40, **options).choices[0].text


def test_stream_is_the_answer_in_pieces(client):
    for seed in range(2):
        options = {"temperature": 1.5, "seed": seed, "max_tokens": 40, "model": "base"}
        messages = [{"role": "user", "content": "裙"}]
        whole = client.chat.completions.create(**options, messages=messages)
        stream = client.chat.completions.create(
            **options, messages=messages, stream=True, stream_options={"include_usage": True}
        )
        *chunks, end, usage = stream
        pieces = [chunk.choices[0].delta.content for chunk in chunks]
        assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 8
        assert end.choices[0].finish_reason == whole.choices[0].finish_reason
        assert usage.usage == whole.usage and not usage.choices
        assert chunks[0].choices[0].delta.role == "assistant"


def test_stop_string_ends_the_answer_before_it(served, client):
    for seed in range(2):
        whole = sampled(client, seed)
        place = len(whole) // 2
        stop = whole[place : place + 5]  # of several tokens
        expected = clean_response(whole[: whole.index(stop)])
        options = {"temperature": 1.5, "top_p": 1.0, "seed": seed, "max_tokens": 40, "stop": ["没有这个", stop]}
        found = complete(client, "裙", **options)
        assert (found.choices[0].text, found.choices[0].finish_reason) == (expected, "stop")
        assert found.usage.completion_tokens < 40
        streamed = [chunk.choices[0].text for chunk in complete(client, "裙", **options, stream=True)]
        assert "".join(streamed) == expected


def test_seed_gives_the_same_answer_whatever_else_is_generated(served, client):
    alone = sampled(client, 7)
    with ThreadPoolExecutor(12) as pool:
        others = [pool.submit(sampled, client, seed, model=MODELS[seed % 3]) for seed in range(20, 31)]
        together = pool.submit(sampled, client, 7)
        assert together.result() == alone
    assert len({alone, *(other.result() for other in others)}) == 12
    assert sampled(client, None) != sampled(client, None)


def test_request_leaves_open_what_the_command_line_says(served, client):
    found = complete(client, "裙", max_tokens=None)
    assert found.usage.completion_tokens == 16
    assert found.choices[0].text == complete(client, "裙", max_tokens=16, temperature=0).choices[0].text


# Clients that go away.


@pytest.mark.parametrize("stream", [False, True])
def test_generation_ends_when_the_client_goes_away(served, client, stream, monkeypatch):
    def cancelled() -> float:
        return metric(served, 'chatglm_requests_total{model="base",outcome="cancelled"}')

    before, most = cancelled(), 1900
    monkeypatch.setattr(served.batcher, "stop_token_ids", ())  # the answer does not end by itself
    options = {"temperature": 1.5, "top_p": 1.0, "seed": 1, "max_tokens": most}
    body = json.dumps({"model": "base", "prompt": "裙", "stream": stream} | options)
    with contextlib.closing(http.client.HTTPConnection(served.address)) as leaving:
        leaving.request("POST", "/v1/completions", body, AUTHORIZED)
        until(lambda: served.batcher.running)
        (answer,) = served.batcher.running.values()
        if stream:
            leaving.getresponse().readline()
    until(lambda: not served.batcher.running and cancelled() == before + 1)
    assert answer.count < most


# What is refused.


def metric(served, name: str) -> float:
    text = served.completer.metrics.text().decode()
    found = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.M)
    return float(found[0]) if found else 0.0


MESSAGES = [{"role": "user", "content": "裙"}]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "blue"}, 404, "model"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": "many"}, 400, "max_tokens"),
        ({"seed": 2**64}, 400, "seed"),
        ({"stop": [""]}, 400, "stop"),
        ({"n": 2}, 400, "n"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"tools": []}, 400, "tools"),
        ({"max_tokens": 2048}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "裙" * 200_000}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "裙"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
        ({"messages": [*MESSAGES, *MESSAGES]}, 400, "messages"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "白"}]}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "白"}]}, 400, "messages"),
    ],
)
def test_invalid_requests_are_refused_in_openais_form(served, change, status, param):
    body = json.dumps({"model": "base", "messages": MESSAGES, "max_tokens": 2} | change, ensure_ascii=False).encode()
    error = refused(served, status, "/v1/chat/completions", body)
    assert error["param"] == param and error["type"] == "invalid_request_error" and error["message"]


def refused(served: SimpleNamespace, expected_status: int, *what) -> dict:
    """The error of a request; arguments as for `request`."""
    status, body = request(served.address, *what)
    assert status == expected_status
    return json.loads(body)["error"]


def test_too_long_a_prompt_has_openais_code(served):
    body = json.dumps({"model": "base", "messages": MESSAGES, "max_tokens": 2048}).encode()
    assert refused(served, 400, "/v1/chat/completions", body)["code"] == "context_length_exceeded"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_bodies_that_are_large_or_no_json_are_refused(served, path):
    refused(served, 413, path, (b" " * 2**16 for _ in range(17)))
    refused(served, 400, path, b" " * LARGEST_BODY)
    refused(served, 400, path, b"{")
    refused(served, 400, path, b"\xff")


@pytest.mark.parametrize("key", [None, "", "wrong", KEY + "x"])
def test_key_is_needed_for_everything_but_health(served, key):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    for path, body in (("/v1/models", None), ("/metrics", None), ("/v1/chat/completions", b"{}")):
        assert refused(served, 401, path, body, headers)["code"] == "invalid_api_key"
    assert request(served.address, "/health", headers=headers) == (200, '{"status":"ok"}')


def test_requests_of_foreign_pages_are_refused(served):
    refused(served, 403, "/v1/models", None, AUTHORIZED | {"Origin": "http://evil.example"})
    evil = {"Host": "evil.example", "Origin": "http://evil.example"}
    assert request(served.address, "/health", headers=evil)[0] == 400


def test_unknown_paths_are_refused_in_openais_form(served):
    refused(served, 404, "/v1/embeddings")
    refused(served, 404, "/docs")
    refused(served, 405, "/v1/completions")


def test_full_queue_is_refused(served, client, monkeypatch):
    monkeypatch.setattr(server_module.Batcher, "submit", lambda self, answer: False)
    with pytest.raises(openai.RateLimitError, match="too many requests"):
        complete(client, "裙")


# Models, metrics, failures.


def test_models_are_base_and_the_adapters(client):
    assert [model.id for model in client.models.list()] == MODELS


def test_metrics_count_requests_and_tokens(served, client):
    names = [f'chatglm_{name}{{model="red"}}' for name in ("prompt_tokens_total", "generated_tokens_total")]
    before = [metric(served, name) for name in names]
    usage = complete(client, "裙", model="red", max_tokens=3).usage
    counted = [usage.prompt_tokens, usage.completion_tokens]
    until(lambda: [metric(served, name) - old for name, old in zip(names, before, strict=True)] == counted)
    status, text = request(served.address, "/metrics")
    assert status == 200 and f"chatglm_slots {SLOTS}.0" in text
    assert metric(served, "chatglm_time_to_first_token_seconds_count") > 0


def test_server_that_is_stopped_says_so_to_whoever_waits(varied_checkpoint, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(server_module, "GRACE", 0.3)
    args = InferenceArguments(serve=True, adapter_path=["none"], batch_size=1)
    completer = make_completer(load(varied_checkpoint, []), tokenizer, args)
    generate, servers = Slots.generate, []

    def generate_without_end(self, highest_slot: int) -> list[list[int]]:
        return [
            [token + (token in completer.batcher.stop_token_ids) for token in row]
            for row in generate(self, highest_slot)
        ]

    def make_server(config: uvicorn.Config) -> uvicorn.Server:
        config.timeout_graceful_shutdown = None
        servers.append(Server(config, completer.batcher))
        return servers[0]

    monkeypatch.setattr(Slots, "generate", generate_without_end)
    with (
        running(build_app(completer, None), make_server) as address,
        client_of(address) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        pieces = iter(complete(client, "裙", stream=True, max_tokens=1900))
        next(pieces)
        waiting = pool.submit(complete, client, "裙", max_tokens=1900)
        until(lambda: completer.batcher.waiting)
        servers[0].should_exit = True
        with pytest.raises(openai.APIError, match="the server was stopped"):
            list(pieces)
        assert waiting.exception().status_code == 503 and "the server was stopped" in str(waiting.exception())
    assert not caplog.messages


def test_failed_generation_ends_all_requests(varied_checkpoint, tokenizer, monkeypatch, caplog):
    args = InferenceArguments(serve=True, adapter_path=["none"], batch_size=1)
    completer = make_completer(load(varied_checkpoint, []), tokenizer, args)

    def fail(self, highest_slot: int):
        until(lambda: completer.batcher.waiting)
        raise RuntimeError("out of order")

    monkeypatch.setattr(Slots, "generate", fail)
    with running(build_app(completer, None)) as address, client_of(address) as client:
        assert [model.id for model in client.models.list()] == ["base"]
        with ThreadPoolExecutor(2) as pool:
            errors = [pool.submit(complete, client, "裙") for _ in range(2)]
        assert all("generation failed" in str(error.exception()) for error in errors)
        with pytest.raises(openai.InternalServerError, match="generation failed"):
            complete(client, "裙", stream=True)
        assert request(address, "/health")[0] == 503
    assert "out of order" in caplog.text
