"""qlora/inference/serve_checks.py: what keeps the API's server from starting."""

import contextlib
import importlib.util
import json
import socket
from pathlib import Path

import pytest

from qlora.arguments import InferenceArguments
from qlora.inference import serve_checks
from qlora.inference.serve_checks import KEY_VARIABLE, check_serve, model_names


@pytest.fixture(autouse=True)
def installed(monkeypatch) -> set[str]:
    """The packages of the server that count as installed."""
    found = set(serve_checks.SERVER_PACKAGES)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in found else None)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    return found


def arguments(**values) -> InferenceArguments:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    return InferenceArguments(**{"serve": True, "adapter_path": ["none"], "port": port} | values)


def make_adapter(folder: Path, base: str) -> str:
    """Writes an adapter's configuration and an empty folder of its base model beside it; returns its path."""
    folder.mkdir()
    (folder.parent / base).mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "target_modules": ["query_key_value"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def test_server_that_can_start_passes(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "open sesame")
    check_serve(arguments())
    check_serve(arguments(adapter_path=[make_adapter(tmp_path / name, "m") for name in ("a", "b")]))


def test_missing_packages_are_named(installed):
    installed -= {"uvicorn", "fastapi"}
    with pytest.raises(
        ValueError, match=r"^--serve needs fastapi, uvicorn, not installed: pip install fastapi uvicorn$"
    ):
        check_serve(arguments())


@pytest.mark.parametrize("key", ["", " ", "芝麻开门"])
def test_key_that_no_header_can_have_is_refused(monkeypatch, key):
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ValueError, match="QLORA_API_KEY is blank or not ASCII"):
        check_serve(arguments())


def test_names_of_models_are_those_of_the_folders():
    assert model_names(["runs/a/checkpoint-1.5", "b/"]) == ["base", "checkpoint-1.5", "b"]
    for paths in (["x/a", "y/a"], ["x/base"]):
        with pytest.raises(ValueError, match=f"the name {paths[0][2:]}; rename a folder"):
            model_names(paths)


def test_adapters_of_different_base_models_need_a_decision(tmp_path):
    paths = [make_adapter(tmp_path / name, f"base of {name}") for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"base of a .*base of b .*give --model_name_or_path"):
        check_serve(arguments(adapter_path=paths))
    check_serve(arguments(adapter_path=paths, model_name_or_path="m"))


def test_missing_adapter_and_busy_port_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no adapter"):
        check_serve(arguments(adapter_path=[str(tmp_path)]))
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} .*in use.*--port"):
            check_serve(arguments(port=port))
