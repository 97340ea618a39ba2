"""The compare page: its event handlers without gradio, and the page itself in a browser, if one is installed."""

import contextlib
import dataclasses
import functools
import http.client
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, add_random_lora, random_checkpoint
from peft import PeftModel
from peft.tuners.lora import LoraLayer

import inference_qlora
import qlora.inference.web
from chatglm.chat import CJK, OFFICIAL_SAMPLING, build_prompt
from glm_shared.chat import Prompt
from qlora.adapter import load_adapter
from qlora.arguments import InferenceArguments
from qlora.data.rows import read_prompts
from qlora.inference.decoding import make_sampler
from qlora.inference.generation import generate_answers
from qlora.inference.serve_checks import PASSWORD_VARIABLE, check_web
from qlora.inference.web import Answerer, Page, conversation_html, with_settings
from qlora.layers.replacement import replace_layers
from qlora.loading import load_quantized_model

PROMPT = "类型#裤*风格#简约"
ARGS = InferenceArguments(max_new_tokens=24).with_sampling(OFFICIAL_SAMPLING)
GREEDY = (False, 50, 0.7, 0.95, 24, 42)
PASSWORD = "芝麻开门"


@pytest.fixture(scope="module")
def checkpoint(tiny_config, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that generates only Chinese characters, and never `<eop>`."""
    chinese = [bool(re.fullmatch(CJK, tokenizer.decode([i]))) for i in range(tiny_config.vocab_size)]

    def change(state: dict[str, torch.Tensor]):
        for name in ("transformer.word_embeddings.weight", "lm_head.weight"):
            state[name] = state[name] * torch.tensor(chinese)[:, None]

    return random_checkpoint(tmp_path_factory.mktemp("chatglm") / "chinese", tiny_config, tokenizer, change)


@pytest.fixture(scope="module")
def adapter_path(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes the answers of `checkpoint`."""
    folder = tmp_path_factory.mktemp("adapter")
    add_random_lora(load_quantized_model(str(checkpoint), torch.float32), std=0.3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path, adapter_path: Path) -> PeftModel:
    model = load_adapter(load_quantized_model(str(checkpoint), torch.float32), str(adapter_path)).eval()
    replace_layers(model, for_training=False)
    return model


@pytest.fixture
def answerer(model: PeftModel, tokenizer) -> Answerer:
    return Answerer(model, tokenizer)


def expected_answers(answerer: Answerer, prompt: str, max_new_tokens: int = 24) -> list[str]:
    """The answers without and with the adapter, as `inference_qlora.py` prints them."""
    common = (answerer.model, answerer.tokenizer, [Prompt(prompt)], max_new_tokens, make_sampler(do_sample=False), 1)
    with answerer.model.disable_adapter():
        before = generate_answers(*common)
    return before + generate_answers(*common)


def adapter_is_enabled(model: PeftModel) -> bool:
    """Whether the adapter is enabled in all layers."""
    return not any(module.disable_adapters for module in model.modules() if isinstance(module, LoraLayer))


# Answers generated side by side.


def test_both_answers_are_those_of_the_command_line(answerer):
    *_, last = answerer.stream(Prompt(PROMPT), (False, True), ARGS)
    assert last == expected_answers(answerer, PROMPT)
    assert last[0] != last[1] and min(map(len, last)) >= 24


def test_answers_are_generated_side_by_side(answerer):
    updates = list(answerer.stream(Prompt(PROMPT), (False, True), ARGS))
    assert len(updates) >= 3
    for first, last in zip(updates[1], updates[-1], strict=True):
        assert 0 < len(first) < len(last) and last.startswith(first)


def test_ended_answer_stays_while_the_other_is_generated(answerer, monkeypatch):
    streams = iter([iter("a"), iter([f"b{i}" for i in range(9)])])
    monkeypatch.setattr(qlora.inference.web, "stream_answer", lambda *_: next(streams))
    assert list(answerer.stream(Prompt(PROMPT), (False, True), ARGS)) == [["a", "b3"], ["a", "b7"], ["a", "b8"]]


def test_adapter_is_enabled_between_updates(answerer):
    updates = answerer.stream(Prompt(PROMPT), (False, True), ARGS)
    next(updates)
    assert adapter_is_enabled(answerer.model)
    updates.close()
    assert adapter_is_enabled(answerer.model) and not answerer.lock.locked()


def test_adapter_is_enabled_after_an_error(answerer, monkeypatch):
    def fail(*_):
        assert not adapter_is_enabled(answerer.model)
        yield ""
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(qlora.inference.web, "stream_answer", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(answerer.stream(Prompt(PROMPT), (False,), ARGS))
    assert adapter_is_enabled(answerer.model) and not answerer.lock.locked()


def test_simultaneous_visitors_get_their_own_answers(answerer):
    prompts = [PROMPT, "类型#裙*颜色#白色"]
    expected = [expected_answers(answerer, prompt) for prompt in prompts]
    found = [None, None]

    def visit(i: int):
        *_, found[i] = answerer.stream(Prompt(prompts[i]), (False, True), ARGS)

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_sampling_follows_the_seed(answerer):
    def sample(seed: int) -> list[str]:
        args = with_settings(ARGS, (True, 0, 1.0, 2.0, 24, seed))
        return list(answerer.stream(Prompt(PROMPT), (False, True), args))[-1]

    assert sample(1) == sample(1) != sample(2)


@pytest.mark.parametrize("prompt", ["", " \n　"])
def test_empty_prompt_is_refused(answerer, prompt):
    with pytest.raises(ValueError, match="The prompt is empty"):
        next(answerer.stream(Prompt(prompt), (True,), ARGS))


def test_prompt_without_room_for_an_answer_is_refused(answerer):
    limit = answerer.model.config.max_sequence_length
    with pytest.raises(ValueError, match=f"over the model's {limit}"):
        next(answerer.stream(Prompt("裙" * limit), (True,), ARGS))
    with pytest.raises(ValueError, match="has 10,000,000 characters"):  # not tokenized, which would take seconds
        next(answerer.stream(Prompt("裙" * 10_000_000), (True,), ARGS))
    length = len(answerer.tokenizer(PROMPT)["input_ids"])
    answerer.check_prompt(Prompt(PROMPT), dataclasses.replace(ARGS, max_new_tokens=limit - length))
    with pytest.raises(ValueError, match=f"has {length} tokens"):
        answerer.check_prompt(Prompt(PROMPT), dataclasses.replace(ARGS, max_new_tokens=limit - length + 1))


def test_prompt_text_comes_before_the_prompt(answerer):
    *_, last = answerer.stream(Prompt(PROMPT), (False, True), dataclasses.replace(ARGS, prompt_text="写广告："))
    assert last == expected_answers(answerer, f"写广告：{PROMPT}") != expected_answers(answerer, PROMPT)


def test_control_tokens_in_a_prompt_stay_text(answerer):
    short = len(answerer.tokenizer("裙")["input_ids"])
    answerer.check_prompt(Prompt("裙<eop>"), dataclasses.replace(ARGS, max_new_tokens=1))
    limit = answerer.model.config.max_sequence_length
    with pytest.raises(ValueError):  # as a control token, <eop> would be one token, and the prompt would fit
        answerer.check_prompt(Prompt("裙<eop>"), dataclasses.replace(ARGS, max_new_tokens=limit - short - 1))


# The event handlers.


def test_compare_uses_the_settings(answerer):
    updates = list(Page(answerer, ARGS).compare(PROMPT, False, 50, 0.7, 0.95, 6, 42))
    assert updates[-1] == expected_answers(answerer, PROMPT, max_new_tokens=6)


@pytest.mark.parametrize("tuned", [True, False])
def test_chat_continues_the_history(answerer, tuned):
    page, rounds = Page(answerer, ARGS), []
    for message in (PROMPT, "类型#裙"):
        history = [(question, reply) for question, reply, _ in rounds]
        expected = expected_answers(answerer, build_prompt(message, history))[tuned]
        *_, (box, rounds, shown) = page.chat(message, rounds, tuned, *GREEDY)
        assert (box, rounds[-1]) == ("", (message, expected, tuned))
    assert len(rounds) == 2
    assert shown == conversation_html(rounds)


def test_conversation_is_escaped_and_names_the_models():
    shown = conversation_html([("<b>", "<img src='x'>", True), ("a & b", "c", False)])
    assert re.findall("<small>(.*?)</small>", shown) == ["你 You", "微调后 After", "你 You", "微调前 Before"]
    assert re.findall(r'class="text">(.*?)</div>', shown) == [
        "&lt;b&gt;",
        "&lt;img src=&#x27;x&#x27;&gt;",
        "a &amp; b",
        "c",
    ]


def test_empty_message_in_a_conversation_is_refused(answerer):
    with pytest.raises(ValueError, match="The prompt is empty"):
        next(Page(answerer, ARGS).chat("", [("问", "答", True)], True, *GREEDY))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((True, 50, 0.7, 0.95, 24, None), "setting is empty"),
        ((True, 50, 1.5, 0.95, 24, 1), "out of range: top_p is 1.5"),
        ((True, 50, 0.7, 0, 24, 1), "temperature is 0"),
        ((True, 50, 0.7, 1e-30, 24, 1), "temperature is 1e-30"),
        ((True, 50, 0.7, 0.95, 0, 1), "max_new_tokens is 0"),
        ((True, 50, 0.7, 0.95, 24, 2**64), "seed is"),
    ],
)
def test_settings_out_of_range_are_refused(answerer, settings, message):
    with pytest.raises(ValueError, match=message):
        next(Page(answerer, ARGS).compare(PROMPT, *settings))


def test_integers_are_accepted_for_floats(answerer):
    args = with_settings(ARGS, (True, 50.0, 1, 1, 24.0, 42))
    assert [repr(value) for value in (args.top_k, args.top_p, args.temperature, args.max_new_tokens)] == [
        "50",
        "1.0",
        "1.0",
        "24",
    ]
    assert list(Page(answerer, ARGS).compare(PROMPT, True, 50, 1, 1, 8, 42))


# What is checked before the model is loaded.


@pytest.fixture
def gradio_version(monkeypatch) -> Iterator[dict[str, str]]:
    """Package name -> version, in place of the installed packages; a test may change it."""
    installed = {"gradio": "6.0.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    return installed


def free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


def test_page_that_can_be_served_passes(gradio_version):
    check_web(InferenceArguments(web=True, port=free_port()))


def test_missing_gradio_ends_in_one_line(gradio_version, monkeypatch, adapter_path):
    del gradio_version["gradio"]
    monkeypatch.setattr(sys, "argv", ["inference_qlora.py", "--web", "--adapter_path", str(adapter_path)])
    with pytest.raises(SystemExit) as raised:
        inference_qlora.main()
    assert raised.value.code == "error: --web needs gradio, which is not installed: pip install gradio"


def test_old_gradio_is_refused(gradio_version):
    gradio_version["gradio"] = "5.49.1"
    with pytest.raises(ValueError, match=r"found 5\.49\.1: pip install --upgrade gradio"):
        check_web(InferenceArguments(web=True))


def test_empty_password_is_refused(gradio_version, monkeypatch):
    monkeypatch.setenv(PASSWORD_VARIABLE, "")
    with pytest.raises(ValueError, match="QLORA_PASSWORD is empty"):
        check_web(InferenceArguments(web=True))


def test_port_in_use_is_refused(gradio_version):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} .*in use.*--port"):
            check_web(InferenceArguments(web=True, port=port))


def test_address_of_another_machine_is_refused(gradio_version):
    with pytest.raises(OSError, match=r"192\.0\.2\.1, port 7860"):  # an address reserved for documentation
        check_web(InferenceArguments(web=True, host="192.0.2.1"))


@pytest.mark.parametrize(("values", "message"), [({"port": 0}, "--port is 0"), ({"chat": True}, "one of them")])
def test_invalid_flags_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        InferenceArguments(web=True, **values)


# The layout.


def test_answers_cannot_be_had_beside_the_queue(answerer):
    pytest.importorskip("gradio", reason="gradio is not installed")
    from qlora.inference.web_guard import Readers
    from qlora.inference.web_page import build_page

    assert not build_page(Page(answerer, ARGS), [PROMPT], Readers()).api_open


def test_reason_of_a_failure_is_logged_and_not_shown(answerer, monkeypatch, caplog):
    pytest.importorskip("gradio", reason="gradio is not installed")
    from qlora.inference.web_guard import Readers
    from qlora.inference.web_page import Shown, build_page

    monkeypatch.setattr(answerer, "stream", lambda *_: 1 / 0)
    blocks = build_page(Page(answerer, ARGS), [PROMPT], Readers())
    compare = next(function.fn for function in blocks.fns.values() if function.api_name == "compare")
    with pytest.warns(UserWarning, match=r"The answer failed; the server's output says why\.$"):
        list(compare(SimpleNamespace(session_hash="abc"), Shown(), PROMPT, *GREEDY))
    assert "ZeroDivisionError" in caplog.text


def test_answer_that_is_cleared_ends(answerer):
    pytest.importorskip("gradio", reason="gradio is not installed")
    from qlora.inference.web_guard import Readers
    from qlora.inference.web_page import Shown, build_page

    blocks, shown = build_page(Page(answerer, ARGS), [PROMPT], readers := Readers()), Shown(cleared=True)
    compare = next(function.fn for function in blocks.fns.values() if function.api_name == "compare")
    updates = compare(SimpleNamespace(session_hash="abc"), shown, PROMPT, *GREEDY)
    assert next(updates) and not shown.cleared  # an earlier answer was
    shown.cleared = True
    assert list(updates) == [] and readers.unread_since == {}


# The page of a server that waits half a second for a visitor to read.

PIECES = 30


@pytest.fixture
def serve(answerer, monkeypatch) -> Iterator[Callable[[Callable[..., Iterator]], str]]:
    """Serves a page whose answers are those of a function; returns its address."""
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    from qlora.inference import web_page

    def serve(stream: Callable[..., Iterator]) -> str:
        port = free_port()
        monkeypatch.setattr(answerer, "stream", stream)
        web_page.serve(Page(answerer, dataclasses.replace(ARGS, port=port)), [PROMPT])
        return f"http://127.0.0.1:{port}"

    launch = functools.partialmethod(gradio.Blocks.launch, prevent_thread_lock=True)
    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    yield serve
    gradio.close_all()


@pytest.fixture
def impatient(serve, monkeypatch) -> str:
    """The address of a page whose answers are numbers, and take longer than a visitor may be silent."""
    from qlora.inference import web_guard

    def count(*_) -> Iterator[list[str]]:
        for number in range(PIECES):
            time.sleep(0.05)
            yield [str(number)] * 2

    monkeypatch.setattr(web_guard, "PATIENCE", 0.5)
    return serve(count)


def request_answers(url: str, session: str) -> http.client.HTTPResponse:
    """Asks as the page does; returns the stream of the answers, of which nothing was read."""
    with urllib.request.urlopen(f"{url}/config") as config:
        functions = json.load(config)["dependencies"]
    number = next(function["id"] for function in functions if function["api_name"] == "compare")
    body = {"data": [None, PROMPT, *GREEDY], "fn_index": number, "session_hash": session}
    headers = {"Content-Type": "application/json"}
    join = urllib.request.Request(f"{url}/gradio_api/queue/join", json.dumps(body).encode(), headers)
    urllib.request.urlopen(join).close()
    return urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash={session}")


def test_stream_that_is_not_read_does_not_hold_the_model(impatient):
    with request_answers(impatient, "silent") as silent:
        with request_answers(impatient, "another") as stream:
            assert any(b'"process_generating"' in line and b'"0"' in line for line in stream)
        sent = b"".join(itertools.takewhile(lambda line: b"process_completed" not in line, silent)).decode()
    assert "the page did not receive it" in sent and f'"{PIECES - 1}"' not in sent


def test_answer_that_the_page_reads_is_not_ended(impatient, browser):
    page = browser.new_page()
    page.goto(impatient)
    compare(page, PROMPT)
    expect_answers(page, [str(PIECES - 1)] * 2)
    page.close()


def test_example_clicked_while_a_piece_is_on_its_way_leaves_nothing(serve, browser, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    on, sent, ended, cancels = gradio.on, threading.Event(), threading.Event(), []

    def on_its_way(ask: Callable[..., Iterator]) -> Callable[..., Iterator]:
        @functools.wraps(ask)
        def held(*values) -> Iterator:
            first, second = ask(*values)
            yield first
            sent.wait(20)
            yield second
            ended.wait(20)

        return held

    monkeypatch.setattr(
        gradio, "on", lambda triggers, ask, *rest, **more: on(triggers, on_its_way(ask), *rest, **more)
    )
    page = browser.new_page()
    page.goto(serve(lambda *_: iter([["1"] * 2, ["2"] * 2])))
    page.route("**/cancel", lambda route: cancels.append(route))
    compare(page, "裙")
    expect_answers(page, ["1"] * 2)
    page.get_by_role("button", name=PROMPT).click()
    expect_answers(page, [""] * 2)
    sent.set()
    expect_answers(page, ["2"] * 2)
    cancels[0].continue_()
    ended.set()
    expect_answers(page, [""] * 2)
    page.close()


# The page in a browser.


@pytest.fixture(scope="module")
def server(adapter_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page with a password, served by the script."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    url = f"http://127.0.0.1:{(port := free_port())}"
    flags = ("--adapter_path", adapter_path, "--port", port, "--max_new_tokens", 24)
    # No proxy answers at this address: serving the page must not need one.
    settings = {
        PASSWORD_VARIABLE: PASSWORD,
        "PYTHONIOENCODING": "utf-8",
        "http_proxy": "http://127.0.0.1:9",
    }
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "w", encoding="utf-8") as lines:
        command = [sys.executable, ROOT / "inference_qlora.py", "--web", *map(str, flags)]
        process = subprocess.Popen(command, env=os.environ | settings, stdout=lines, stderr=lines)
    try:
        wait_for(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=20)


def wait_for(url: str, process: subprocess.Popen, log: Path):
    """Waits until the server answers, which takes seconds, or minutes where many programs share the machine."""
    for _ in range(1200):
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(url):
            return
        time.sleep(0.25)
    pytest.fail(f"the server does not answer: {log.read_text(encoding='utf-8')}")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium is installed")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def page(server: str, browser):
    """The page after the login; checks at the end that it requested nothing from other servers."""
    context = browser.new_context()
    page, requests = context.new_page(), []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(server)
    log_in(page, PASSWORD)
    page.get_by_label("输入 Prompt").wait_for()
    yield page
    context.close()
    assert requests and all(url.startswith((server, "data:", "blob:")) for url in requests)


def log_in(page, password: str):
    page.locator("input").nth(0).fill("anyone")
    page.locator("input[type=password]").fill(password)
    page.get_by_role("button").first.click()


def answer_box(page, label: str):
    return page.locator("label", has_text=label).locator("textarea")


def test_page_shows_nothing_without_the_password(server, browser):
    for path in ("/config", "/gradio_api/info"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(server + path)
        assert refused.value.code == 401
    page = browser.new_page()
    page.goto(server)
    log_in(page, "wrong")
    page.get_by_text("Incorrect Credentials").wait_for()
    assert page.get_by_label("输入 Prompt").count() == 0
    page.close()


def compare(page, prompt: str):
    page.get_by_label("输入 Prompt").fill(prompt)
    page.get_by_role("button", name="Generate").click()


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


def expect_answers(page, answers: list[str]):
    for label, answer in zip(("微调前 Before", "微调后 After"), answers, strict=True):
        expect(answer_box(page, label)).to_have_value(answer, timeout=20000)


def test_generate_button_shows_both_answers(page, answerer):
    compare(page, PROMPT)
    expect_answers(page, expected_answers(answerer, PROMPT))


def test_example_can_be_clicked(page, answerer):
    compare(page, PROMPT)
    expect_answers(page, expected_answers(answerer, PROMPT))  # what is generated later would fill the boxes again
    example = next(iter(read_prompts(str(inference_qlora.EXAMPLES)).values())).query
    page.get_by_role("button", name=example).click()
    expect(page.get_by_label("输入 Prompt")).to_have_value(example)
    expect_answers(page, ["", ""])


def test_example_clicked_while_answers_are_generated_ends_them(page, answerer):
    page.get_by_label("Max tokens").fill("1800")
    compare(page, PROMPT)
    for label in ("微调前 Before", "微调后 After"):
        expect(answer_box(page, label)).not_to_have_value("")
    example, *_ = read_prompts(str(inference_qlora.EXAMPLES)).values()
    page.get_by_role("button", name=example.query).click()
    expect_answers(page, ["", ""])
    page.wait_for_timeout(1000)
    expect_answers(page, ["", ""])


def test_stop_button_ends_the_answers_and_later_answers_are_right(page, answerer):
    page.get_by_label("Max tokens").fill("1800")
    compare(page, PROMPT)
    box = answer_box(page, "微调后 After")
    expect(box).not_to_have_value("")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_timeout(500)
    stopped = box.input_value()
    page.wait_for_timeout(500)
    assert box.input_value() == stopped
    page.get_by_label("Max tokens").fill("24")
    compare(page, PROMPT)
    expect_answers(page, expected_answers(answerer, PROMPT))
    assert 0 < len(stopped) < 1800


def test_conversation_shows_what_was_typed_and_the_reply(page, answerer):
    page.get_by_role("tab", name="Chat").click()
    # The fixture checks that the image is not requested.
    typed = "# 裙 <sop> <img src=http://127.0.0.1:9/x> <b>b</b> **a** `c` $d$ ${1 + 1} {{value}} &amp;   e"
    bubbles, history = page.locator(".bubble .text"), []
    for message in (typed, PROMPT):
        history.append((message, expected_answers(answerer, build_prompt(message, history))[1]))
        page.get_by_label("消息 Message").fill(message)
        page.get_by_label("消息 Message").press("Enter")
        expect(bubbles).to_have_text([text for pair in history for text in pair], timeout=20000)
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_text("The prompt is empty.")).to_be_visible()
    expect(bubbles).to_have_count(4)
    expect(page.locator(".bubble small")).to_have_text(["你 You", "微调后 After"] * 2)
    page.get_by_role("button", name="Clear").click()
    expect(bubbles).to_have_count(0)


def test_texts_are_shown_as_they_are(page, answerer):
    # Drawn by the browser from what the server sends; a random model cannot be made to answer this.
    text = "\n  <form action=/x><input></form>\n\n\t# head\n"
    page.get_by_role("tab", name="Chat").click()
    page.get_by_label("消息 Message").fill(PROMPT)
    page.get_by_role("button", name="Send").click()
    # A later update of the answer would draw the bubbles anew.
    expect(page.locator(".bubble .text").nth(1)).to_have_text(expected_answers(answerer, PROMPT)[1], timeout=20000)
    page.evaluate("html => document.querySelector('.bubble').outerHTML = html", conversation_html([(text, "", True)]))
    bubble = page.locator(".bubble .text").first
    assert bubble.inner_text() == text and bubble.locator("*").count() == 0


def test_errors_are_shown_and_answers_stay(page, answerer):
    compare(page, PROMPT)
    answers = expected_answers(answerer, PROMPT)
    expect_answers(page, answers)
    compare(page, " ")
    expect(page.get_by_text("The prompt is empty.")).to_be_visible()
    page.get_by_label("top_p").fill("3")
    compare(page, PROMPT)
    expect(
        page.get_by_text("A decoding setting is out of range: top_p is 3.0; it must be above 0 and at most 1.")
    ).to_be_visible()
    expect_answers(page, answers)
