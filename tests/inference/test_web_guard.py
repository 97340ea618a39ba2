"""qlora/inference/web_guard.py: what does not reach the server, and answers that nobody reads."""

import pytest

pytest.importorskip("starlette", reason="starlette is not installed, which gradio brings along")

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from qlora.inference import web_guard
from qlora.inference.web_guard import LARGEST_BODY, MOST_TRIES, READ, LoginTries, Readers, middleware

JOIN = "/gradio_api/queue/join"


async def echo_size(request: Request) -> Response:
    return JSONResponse(len(await request.body()))


async def login(request: Request) -> Response:
    return Response(status_code=200 if await request.body() == b"right" else 400)


def client(
    host: str = "127.0.0.1", address: str = "http://127.0.0.1:7860", readers: Readers | None = None
) -> TestClient:
    """A client of a server that takes everything, behind the guard."""
    routes = [Route("/login", login, methods=["POST"]), Route("/{path:path}", echo_size, methods=["GET", "POST"])]
    app = Starlette(routes=routes, middleware=middleware(host, readers or Readers()))
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


@pytest.mark.parametrize("last_read", [None, 9])
def test_answer_that_is_not_read_is_ended(monkeypatch, last_read):
    now, readers, found = [0.0], Readers(), []
    monkeypatch.setattr(web_guard.time, "monotonic", lambda: now[0])
    visitor = client(readers=readers)
    with pytest.raises(ValueError, match="since the page did not receive it"):
        for update in readers.while_read(iter(range(100)), "abc"):
            found.append(update)
            now[0] += 1
            for session in ("abc",) * (last_read is not None and update <= last_read) + ("another",):
                assert visitor.post(READ, params={"session_hash": session}).status_code == 204
    unread = 0 if last_read is None else last_read + 1
    assert found == list(range(unread + int(web_guard.PATIENCE) + 1))
    assert readers.unread_since == {}


def test_model_that_is_slow_is_waited_for(monkeypatch):
    now, readers = [0.0], Readers()
    monkeypatch.setattr(web_guard.time, "monotonic", lambda: now[0])
    for _ in readers.while_read(iter(range(9)), "abc"):
        readers.confirm("abc")
        now[0] += 10 * web_guard.PATIENCE
