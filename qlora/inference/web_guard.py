"""What stands between the network and gradio's server, as ASGI middleware. Needs starlette, which gradio brings along.

gradio itself takes uploads of any size, requests from foreign pages and any number of passwords, and goes on with an
answer that nobody receives.
"""

import asyncio
import collections
import time
from collections.abc import Iterator
from typing import TypeVar
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOGIN, STREAM = "/login", "/gradio_api/queue/data"
POSTS = (  # all that the page sends; gr.Examples asks outside the queue
    LOGIN,
    "/gradio_api/queue/join",
    "/gradio_api/cancel",
    "/gradio_api/reset",
    "/gradio_api/run/predict",
)
LARGEST_BODY = 2**20  # bytes
LOCAL_HOSTS = ("127.0.0.1", "localhost")
PATIENCE = 5.0  # seconds
MOST_TRIES, TRIES_PERIOD = 5, 60.0  # passwords of one address in so many seconds
Update = TypeVar("Update")


class Streams:
    """The visitors who receive their answers at present, by gradio's session hash."""

    def __init__(self) -> None:
        self.open: collections.Counter[str] = collections.Counter()

    def while_received(self, updates: Iterator[Update], session: str) -> Iterator[Update]:
        """The updates of an answer, as long as the visitor receives them, with PATIENCE for the stream to open."""
        last_received = time.monotonic()
        for update in updates:
            if self.open[session]:
                last_received = time.monotonic()
            if time.monotonic() - last_received > PATIENCE:
                return
            yield update


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
    """Refuses what the page never sends, and watches logins and streams.

    Args:
        app: the server.
        streams: where open streams are noted.
    """

    def __init__(self, app: ASGIApp, streams: Streams):
        self.app, self.streams, self.tries = app, streams, LoginTries()

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
        elif request.url.path.rstrip("/") == STREAM:
            await self.stream(scope, receive, send, request.query_params.get("session_hash", ""))
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

    async def stream(self, scope: Scope, receive: Receive, send: Send, session: str) -> None:
        """Passes a stream of updates on, and ends it when the visitor stops reading it."""

        async def send_or_end(message: Message) -> None:
            try:
                await asyncio.wait_for(send(message), PATIENCE)
            except asyncio.TimeoutError:
                raise OSError("the stream is not read") from None  # what starlette expects of a lost connection

        self.streams.open[session] += 1
        try:
            await self.app(scope, receive, send_or_end)
        except ClientDisconnect:
            pass
        finally:
            self.streams.open[session] -= 1
            if not self.streams.open[session]:
                del self.streams.open[session]


def middleware(host: str, streams: Streams) -> list[Middleware]:
    """The middleware for a server that listens on this address."""
    hosts = allowed_hosts(host)
    return [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(Guard, streams=streams)]


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
