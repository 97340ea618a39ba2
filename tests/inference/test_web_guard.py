"""qlora/inference/web_guard.py: what does not reach the server, and streams that nobody reads."""

import asyncio

import pytest

pytest.importorskip("starlette", reason="starlette is not installed, which gradio brings along")

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from qlora.inference import web_guard
from qlora.inference.web_guard import LARGEST_BODY, MOST_TRIES, STREAM, Guard, LoginTries, Streams, middleware

JOIN = "/gradio_api/queue/join"


async def echo_size(request: Request) -> Response:
    return JSONResponse(len(await request.body()))


async def login(request: Request) -> Response:
    return Response(status_code=200 if await request.body() == b"right" else 400)


def client(host: str = "127.0.0.1", address: str = "http://127.0.0.1:7860") -> TestClient:
    """A client of a server that takes everything, behind the guard."""
    routes = [Route("/login", login, methods=["POST"]), Route("/{path:path}", echo_size, methods=["GET", "POST"])]
    app = Starlette(routes=routes, middleware=middleware(host, Streams()))
    return TestClient(app, base_url=address, raise_server_exceptions=False)


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/upload/", "/upload", "/gradio_api/run/compare"])
def test_only_what_the_page_sends_can_be_posted(path):
    assert client().post(path, content=b"x").status_code == 404
    assert client().post(JOIN, content=b"x").json() == 1


def test_large_bodies_are_refused():
    def chunks(size: int):
        yield from (b"x" * 2**16 for _ in range(size // 2**16))

    for make in (lambda size: b"x" * size, chunks):
        assert client().post(JOIN, content=make(LARGEST_BODY)).json() == LARGEST_BODY
        assert client().post(JOIN, content=make(LARGEST_BODY + 2**16)).status_code == 413


@pytest.mark.parametrize("path", [JOIN, "/config"])
@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9", "http://127.0.0.1:7860.evil"])
def test_requests_of_foreign_pages_are_refused(path, origin):
    for method in ("GET", "POST"):
        assert client().request(method, path, headers={"origin": origin}).status_code in (403, 404)
    assert client("0.0.0.0").get(path, headers={"origin": origin}).status_code == 403


@pytest.mark.parametrize("address", ["http://127.0.0.1:7860", "http://localhost:9000"])  # the second through a tunnel
def test_own_page_is_admitted(address):
    assert client(address=address).post(JOIN, headers={"origin": address}).status_code == 200


def test_foreign_name_of_a_local_address_is_refused():
    evil = "http://evil.example:7860"
    assert client(address=evil).get("/", headers={"origin": evil}).status_code == 400
    assert client("0.0.0.0", "http://gpu.lan:7860").get("/", headers={"origin": "http://gpu.lan:7860"}).is_success


def test_passwords_cannot_be_tried_without_end(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(web_guard.time, "monotonic", lambda: now[0])
    tries = LoginTries()
    assert [tries.admit("a") for _ in range(MOST_TRIES + 2)] == [True] * MOST_TRIES + [False] * 2
    assert tries.admit("b")
    now[0] += web_guard.TRIES_PERIOD + 1
    assert tries.admit("a") and list(tries.times) == ["a"]


def test_right_password_after_too_many_wrong_ones_is_refused():
    visitor = client()
    for _ in range(2):  # the right password ends the count
        for password in [b"wrong"] * (MOST_TRIES - 1) + [b"right"]:
            status = visitor.post("/login", content=password).status_code
        assert status == 200
    for _ in range(MOST_TRIES):
        visitor.post("/login", content=b"wrong")
    assert visitor.post("/login", content=b"right").status_code == 400


def test_stream_that_is_not_read_is_ended(monkeypatch):
    monkeypatch.setattr(web_guard, "PATIENCE", 0.05)
    streams, sent = Streams(), []

    async def updates():
        for i in range(9):
            assert streams.open["abc"] == 1
            yield str(i)

    async def app(scope, receive, send):
        await StreamingResponse(updates())(scope, receive, send)

    async def send(message):
        sent.append(message)
        await asyncio.sleep(60 if len(sent) > 3 else 0)

    scope = {"type": "http", "method": "GET", "path": STREAM, "query_string": b"session_hash=abc", "headers": []}
    scope["asgi"] = {"spec_version": "2.4"}
    asyncio.run(asyncio.wait_for(Guard(app, streams)(scope, None, send), timeout=10))
    assert len(sent) == 4 and not streams.open


def test_answer_ends_when_nobody_receives_it(monkeypatch):
    now, streams, found = [0.0], Streams(), []
    monkeypatch.setattr(web_guard.time, "monotonic", lambda: now[0])
    for update in streams.while_received(iter(range(100)), "abc"):
        found.append(update)
        now[0] += 1
        streams.open["abc"] = int(2 <= update < 9)  # it opens after 2 s, and closes after 9
    assert found == list(range(9 + int(web_guard.PATIENCE) + 1))
