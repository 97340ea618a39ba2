"""The API's server in a thread, and OpenAI's own client."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
pytest.importorskip("fastapi", reason="fastapi is not installed: the API cannot be served")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed: the API cannot be served")
pytest.importorskip("prometheus_client", reason="prometheus_client is not installed: the API cannot be served")


@contextlib.contextmanager
def running(app, kind: Callable[[uvicorn.Config], uvicorn.Server] = uvicorn.Server) -> Iterator[str]:
    """The address of a server in a thread, which no proxy hides."""
    server = kind(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "*")
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def client_of(address: str, key: str = "none") -> openai.OpenAI:
    """OpenAI's client for that server."""
    return openai.OpenAI(base_url=f"http://{address}/v1", api_key=key, max_retries=0)
