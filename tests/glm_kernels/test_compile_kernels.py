"""The Triton kernels compile without a GPU, and their shared memory fits the limit of consumer GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton here: the kernels are not compiled")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
# Source: CUDA C++ Programming Guide, technical specifications per compute capability; bytes per thread block.
MOST_SHARED_MEMORY = {86: 99 * 1024}


@pytest.mark.parametrize("capability", MOST_SHARED_MEMORY)
def test_every_kernel_fits(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, SCRIPT, str(capability)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) >= 15
    too_large = {name: size for name, size in found.items() if size > MOST_SHARED_MEMORY[capability]}
    assert not too_large
