"""The Triton kernels compile without a GPU, and their shared memory fits the limits of GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton here: the kernels are not compiled")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
# Source: CUDA C++ Programming Guide, technical specifications per compute capability; KiB per thread block.
MOST_SHARED_MEMORY = {"70": 96, "75": 64, "80": 163, "86": 99, "89": 99, "90": 227, "120": 99}


def test_every_kernel_fits():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "86", *(capability for capability in MOST_SHARED_MEMORY if capability != "86")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    counts = dict.fromkeys(found, 8) | {"70": 2, "75": 2, "86": 26, "89": 11, "90": 11, "120": 11}
    assert {capability: len(kernels) for capability, kernels in found.items()} == counts
    assert found.keys() == MOST_SHARED_MEMORY.keys()
    for capability, kernels in found.items():
        too_large = {name: size for name, size in kernels.items() if size > MOST_SHARED_MEMORY[capability] * 1024}
        assert not too_large
