"""Results of benchmarks: JSON lines that say what was measured, with which code, on which machine."""

import hashlib
import json
import os
import platform
from collections.abc import Iterable
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
    for path in sorted(path for folder in CODE for kind in ("*.py", "*.cu") for path in (root / folder).rglob(kind)):
        whole.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:12]


def newest_records(path: Path) -> dict[str, dict]:
    """The last record of each name in a file."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return {record["name"]: record for record in records}


def check_comparable(records: Iterable[dict]):
    """ValueError if the records of a table are not all of the same code, GPU and processor."""
    kinds = {record["name"]: f"{record['code']} on {record['gpu']}, {record['processor']}" for record in records}
    if len({*kinds.values()}) > 1:
        listed = "; ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise ValueError(f"measure all rows of a table with one version on one machine; these differ: {listed}.")
