"""Results of benchmarks: JSON lines that say what was measured, with which code, on which machine."""

import hashlib
import json
import os
import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from qlora.arguments import REPOSITORY
from qlora.units import GIB

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes")
MODELS = ("chatglm", "chatglm2", "glm_kernels", "glm_models", "glm_shared")
CODE = (*MODELS, "qlora/data", "qlora/inference", "qlora/layers", "qlora/training")


def machine() -> dict:
    """GPU, processor and versions."""
    has_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "gpu_gib": round(torch.cuda.get_device_properties(0).total_memory / GIB) if has_gpu else None,
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in PACKAGES if find_spec(name)},
    }


def processor() -> str:
    """The name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def code_hash(root: Path = REPOSITORY) -> str:
    """The first digits of a checksum of all code that the speed depends on."""
    whole = hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (root / folder).rglob("*.py")):
        whole.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:12]


def newest_records(path: Path) -> dict[str, dict]:
    """The last record of each name in a file.

    Raises:
        ValueError: they are not all of the same code, GPU and processor, so that they cannot be compared.
    """
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    newest = {record["name"]: record for record in records}
    kinds = {(record["code"], record["gpu"], record["processor"]) for record in newest.values()}
    if len(kinds) > 1:
        listed = "; ".join(f"{name}: {record['code']} on {record['gpu']}" for name, record in newest.items())
        raise ValueError(f"{path}: measure all of them anew, with one version on one machine. They differ: {listed}")
    return newest
