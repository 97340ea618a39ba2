"""What is checked, before the model is loaded, of the server of the page or of the API; needs no web framework."""

import importlib.metadata
import importlib.util
import os
import socket
from pathlib import Path

from qlora.adapter import base_model_path
from qlora.arguments import InferenceArguments

# Not flags, which could be read in the list of processes.
PASSWORD_VARIABLE, KEY_VARIABLE = "QLORA_PASSWORD", "QLORA_API_KEY"
SERVER_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def check_web(args: InferenceArguments):
    """Checks that the page can be served.

    Args:
        args: with host and port.
    Raises:
        ValueError: gradio is missing or too old, or the password is empty.
        OSError: the host and port cannot be bound.
    """
    try:
        version = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("--web needs gradio, which is not installed: pip install gradio") from None
    if int(version.split(".")[0]) < 6:
        raise ValueError(f"--web needs gradio 6 or newer, found {version}: pip install --upgrade gradio")
    if os.environ.get(PASSWORD_VARIABLE) == "":
        raise ValueError(f"{PASSWORD_VARIABLE} is empty: set it to a password, or unset it for a page without one.")
    check_address(args)


def check_serve(args: InferenceArguments):
    """Checks that the API can be served.

    Raises:
        ValueError: a package is missing, the key is blank or not ASCII, or adapters have the same name or different
            base models.
        FileNotFoundError: there is no adapter, or the base model that it names is nowhere.
        OSError: the host and port cannot be bound.
    """
    missing = [name for name in SERVER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--serve needs {', '.join(missing)}, not installed: pip install {' '.join(missing)}")
    model_names(args.adapter_path)
    if not args.model_name_or_path:
        check_same_base(args.adapter_path)
    key = os.environ.get(KEY_VARIABLE)
    if key is not None and not (key.strip() and key.isascii()):
        raise ValueError(
            f"{KEY_VARIABLE} is blank or not ASCII: set it to a key, or unset it for a server without one."
        )
    check_address(args)


def check_same_base(adapter_paths: list[str]):
    """ValueError for adapters that name several base models; errors as for `base_model_path`."""
    bases = {path: Path(base_model_path(path)).resolve() for path in adapter_paths}
    if len(set(bases.values())) > 1:
        named = ", ".join(f"{base} ({path})" for path, base in bases.items())
        raise ValueError(f"--adapter_path: the adapters name several base models, {named}; give --model_name_or_path.")


def model_names(adapter_paths: list[str]) -> list[str]:
    """The names by which requests choose a model: `base`, and those of the adapters' folders.

    Raises:
        ValueError: two have the same name.
    """
    names = ["base", *(Path(path).resolve().name for path in adapter_paths)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--adapter_path: two models would have the name {name}; rename a folder.")
    return names


def check_address(args: InferenceArguments):
    """OSError unless a server can listen on the host and port."""
    try:
        with socket.socket() as probe:
            # As the server does: a port that another server closed a moment ago can be bound.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((args.host, args.port))
    except OSError as error:
        raise OSError(
            f"the server cannot listen on {args.host}, port {args.port} ({error.strerror}). Choose another --port, or "
            "an address of this machine as --host."
        ) from error
