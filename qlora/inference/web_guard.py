"""What stands between the network and gradio's server, as ASGI middleware. Needs starlette, which gradio brings along.

gradio itself takes uploads of any size, requests from foreign pages and any number of passwords, and goes on with an
answer that nobody receives.
"""

import time
from collections.abc import Iterator
from typing import TypeVar
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOGIN, READ = "/login", "/gradio_api/read"
POSTS = (  # all that the page sends; gr.Examples asks outside the queue
    LOGIN,
    READ,
    "/gradio_api/queue/join",
    "/gradio_api/cancel",
    "/gradio_api/reset",
    "/gradio_api/run/predict",
)
LARGEST_BODY = 2**20  # bytes
LOCAL_HOSTS = ("127.0.0.1", "localhost")
PATIENCE = 5.0  # seconds
UNREAD = "页面没有接收回答，生成已停止。 The answer was stopped, since the page did not receive it."
MOST_TRIES, TRIES_PERIOD = 5, 60.0  # passwords of one address in so many seconds
Update = TypeVar("Update")


class Readers:
    """Whether visitors, known by gradio's session hash, read the streams of their answers.

    That a stream is open, or accepts more, says nothing: the buffers of a connection hold more than an answer. So the
    page confirms each piece that it has read.
    """

    def __init__(self) -> None:
        self.unread_since: dict[str, float | None] = {}  # of visitors who are being answered

    def while_read(self, updates: Iterator[Update], session: str) -> Iterator[Update]:
        """The updates of an answer.

        Raises:
            ValueError: the visitor has confirmed none for PATIENCE.
        """
        self.unread_since[session] = None
        try:
            for update in updates:
                now = time.monotonic()
                since = self.unread_since[session]
                if since is None:
                    self.unread_since[session] = now
                elif now - since > PATIENCE:
                    raise ValueError(UNREAD)
                yield update
        finally:
            del self.unread_since[session]

    def confirm(self, session: str) -> None:
        """Notes that a visitor has read a piece of the stream."""
        if session in self.unread_since:
            self.unread_since[session] = None


class LoginTries:
    """Counts the passwords that an address tried, until it gave the right one."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def admit(self, address: str) -> bool:
        """Whether this address may try a password now; counts the try."""
        start = time.monotonic() - TRIES_PERIOD
        recent = {key: [moment for moment in times if moment > start] for key, times in self.times.items()}
        self.times = {key: times for key, times in recent.items() if times}
        times = self.times.setdefault(address, [])
        admitted = len(times) < MOST_TRIES
        if admitted:
            times.append(time.monotonic())
        return admitted


class Guard:
    """Refuses what the page never sends, counts logins, and takes what the page confirms.

    Args:
        app: the server.
        readers: who confirm what they have read.
    """

    def __init__(self, app: ASGIApp, readers: Readers):
        self.app, self.readers, self.tries = app, readers, LoginTries()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        refusal = self.refusal(request)
        if refusal:
            await PlainTextResponse(*refusal)(scope, receive, send)
        elif request.url.path.rstrip("/") == LOGIN:
            await self.app(scope, limited(receive), self.forgiving(send, address_of(request)))
        elif request.url.path.rstrip("/") == READ:
            self.readers.confirm(request.query_params.get("session_hash", ""))
            await Response(status_code=204)(scope, receive, send)
        else:
            await self.app(scope, limited(receive), send)

    def refusal(self, request: Request) -> tuple[str, int] | None:
        """Text and status of the answer to a request that is not passed on; None for the others."""
        path = request.url.path.rstrip("/")
        if is_foreign(request):
            return "another page sent this request", 403
        if request.method == "POST" and path not in POSTS:
            return "not found", 404
        # With status 400 the login page says that it failed.
        if request.method == "POST" and path == LOGIN and not self.tries.admit(address_of(request)):
            return "too many tries", 400
        return None

    def forgiving(self, send: Send, address: str) -> Send:
        """Forgets the tries of an address with the right password."""

        async def forgive_and_send(message: Message) -> None:
            if message.get("status") == 200:
                self.tries.times.pop(address, None)
            await send(message)

        return forgive_and_send


def middleware(host: str, readers: Readers) -> list[Middleware]:
    """The middleware for a server that listens on this address."""
    hosts = allowed_hosts(host)
    return [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(Guard, readers=readers)]


def allowed_hosts(host: str) -> list[str]:
    """The names that the Host header may have, for a server that listens on this address.

    On a local address the name must be local, too: a foreign one has been pointed at this machine by its owner. Other
    addresses may have any name.
    """
    return list(LOCAL_HOSTS) if host in LOCAL_HOSTS else ["*"]


def is_foreign(request: Request) -> bool:
    """Whether a page of another server sends this request."""
    headers = request.headers
    return "origin" in headers and urlsplit(headers["origin"]).netloc != headers.get("host")


def limited(receive: Receive) -> Receive:
    """Receives a body of at most LARGEST_BODY bytes; HTTPException for a larger one."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > LARGEST_BODY:
            raise HTTPException(413)
        return message

    return counted


def address_of(request: Request) -> str:
    """The network address of a visitor."""
    return request.client.host if request.client else ""
