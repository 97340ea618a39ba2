"""A stand-in of the hubs' HTTP interfaces on 127.0.0.1, as far as their clients use it, with faults to order."""

import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils.sha import git_hash

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALLEST_LFS = 10_000  # bytes


@dataclass
class Hub:
    """What the server has, what it was asked, and what goes wrong.

    Attributes:
        models, datasets: name -> name of a file -> content.
        refused: name of a model -> status and error code of the answer.
        damaged: names of files whose last byte is sent wrong.
        breaks: name of a file -> (bytes after which it stops, what happens then), once.
        requests: method, path and Range of each request.
    """

    url: str = ""
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    datasets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    breaks: dict[str, tuple[int, Callable[[socket.socket], None]]] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def files_asked(self) -> list[str]:
        """The names of the files that were asked for."""
        return [path.rpartition("/")[2] for _, path, _ in self.requests if "/resolve/" in path]


def use_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    """Makes huggingface_hub ask this hub, as HF_ENDPOINT would if it had been set before the import."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def reset(connection: socket.socket):
    """Ends a connection as a broken line does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def entry(name: str, content: bytes) -> dict:
    """A file as the Hugging Face Hub lists it; large ones are in LFS."""
    sha256 = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
    lfs = {"lfs": {"size": len(content), "sha256": sha256, "oid": sha256, "pointerSize": len(pointer)}}
    oid = git_hash(pointer if len(content) >= SMALLEST_LFS else content)
    described = {"size": len(content), "oid": oid, "blobId": oid}
    return (
        {"rfilename": name, "path": name, "type": "file"} | described | (lfs if len(content) >= SMALLEST_LFS else {})
    )


def scope_entry(name: str, content: bytes) -> dict:
    """A file as ModelScope lists it."""
    return {
        "Name": name,
        "Path": name,
        "Type": "blob",
        "Size": len(content),
        "Sha256": hashlib.sha256(content).hexdigest(),
    }


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    """Runs a server for a hub that is empty at first."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            answer(hub, self)

        do_HEAD = do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def answer(hub: Hub, request: BaseHTTPRequestHandler):
    """Answers a request."""
    url = urlsplit(request.path)
    path = unquote(url.path)
    length = int(request.headers.get("Content-Length") or 0)
    body = json.loads(request.rfile.read(length)) if length and request.command == "POST" else {}
    file_path = parse_qs(url.query).get("FilePath", [""])[0]  # ModelScope's
    hub.requests.append((request.command, path + (file_path and f"/{file_path}"), request.headers.get("Range")))
    about_repository = r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(revision|tree|paths-info)/([^/]+).*)?"
    if match := re.fullmatch(about_repository, path):
        kind, name, what, revision = match.groups()
        answer_listing(hub, request, getattr(hub, kind), name, what, revision, body)
    elif match := re.fullmatch(r"(/datasets)?/([\w.-]+/[\w.-]+)/resolve/[^/]+/(.+)", path):
        is_data, name, file = match.groups()
        answer_file(hub, request, (hub.datasets if is_data else hub.models).get(name, {}), file)
    elif match := re.fullmatch(r"/api/v1/models/([\w.-]+/[\w.-]+)/repo(/files)?", path):
        name, is_listing = match.groups()
        files = hub.models.get(name, {})
        if name not in hub.models:
            send_json(request, {"Code": 10010205001, "Message": f"Record {name} not found", "Success": False}, 404)
        elif is_listing:
            send_json(request, {"Code": 200, "Data": {"Files": [scope_entry(*item) for item in files.items()]}})
        else:
            answer_file(hub, request, files, file_path)
    else:
        send_json(request, {"error": "not found"}, 404, "EntryNotFound")


def answer_listing(hub, request, repositories, name, what, revision, body):
    """Answers a question about a repository."""
    if name in hub.refused:
        send_json(request, {"error": "refused"}, *hub.refused[name])
    elif name not in repositories:
        send_json(request, {"error": "Repository not found"}, 404, "RepoNotFound")
    elif revision not in (None, "main", "v1", COMMIT):
        send_json(request, {"error": "Invalid rev"}, 404, "RevisionNotFound")
    else:
        entries = [entry(*item) for item in repositories[name].items()]
        if what in ("tree", "paths-info"):
            paths = body.get("paths")
            send_json(request, [item for item in entries if paths is None or item["path"] in paths])
        else:
            send_json(request, {"id": name, "sha": COMMIT, "siblings": entries, "tags": [], "private": False})


def answer_file(hub: Hub, request: BaseHTTPRequestHandler, files: dict[str, bytes], name: str):
    """Sends a file, or its end."""
    if name not in files:
        send_json(request, {"error": "Entry not found"}, 404, "EntryNotFound")
        return
    content = files[name]
    described = entry(name, content)
    checksum = described["lfs"]["sha256"] if "lfs" in described else described["oid"]
    if name in hub.damaged:
        content = content[:-1] + bytes([content[-1] ^ 1])
    start = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
    rest = content[start:]
    request.send_response(206 if request.headers.get("Range") else 200)
    request.send_header("ETag", f'"{checksum}"')
    request.send_header("X-Repo-Commit", COMMIT)
    request.send_header("Content-Length", str(len(rest)))
    request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    request.end_headers()
    if request.command == "HEAD":
        return
    if name in hub.breaks:
        size, happen = hub.breaks.pop(name)
        request.wfile.write(rest[:size])
        request.wfile.flush()
        happen(request.connection)
        request.close_connection = True
    else:
        request.wfile.write(rest)


def send_json(request: BaseHTTPRequestHandler, value: object, status: int = 200, error: str | None = None):
    """Sends a JSON value."""
    content = json.dumps(value).encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(content)))
    if error:
        request.send_header("X-Error-Code", error)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)
