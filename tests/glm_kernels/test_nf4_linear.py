"""The CUDA kernel of glm_kernels/nf4_linear.cu, on a CPU and compiled for GPUs that are not there."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch

from glm_kernels import cuda_kernel, nf4_linear

SHAPES = [(33, 576), (70, 1088), (40, 2304)]  # in some rounds not every warp has a block of its own


class EmulatedKernel:
    """In place of a `CudaKernel`, of which a GPU would run few programs at once."""

    most_programs = 2

    def __init__(self, tokens: int, dtype: torch.dtype, folder: Path):
        library = folder / f"{tokens}.so"
        kernel, macros = nf4_linear.kernel_of(tokens, dtype)
        macros |= {"KERNEL": kernel}
        command = ["c++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", f"-I{nf4_linear.SOURCE.parent}"]
        command += [f"-D{name}={value}" for name, value in macros.items()]
        source = Path(__file__).with_name("emulated_nf4_linear.cpp")
        subprocess.run([*command, source, "-o", library], check=True)
        self.launch = ctypes.CDLL(str(library)).launch

    def __call__(self, programs: int, *arguments):
        self.launch(programs, *(ctypes.c_void_p(a.data_ptr()) if torch.is_tensor(a) else a for a in arguments))


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler of C++")
@pytest.mark.parametrize(
    ("tokens", "dtype", "tile"),
    [
        (1, torch.bfloat16, 8),
        (8, torch.float16, 8),
        (9, torch.bfloat16, 16),
        (31, torch.bfloat16, 32),
        (33, torch.bfloat16, 64),
    ],
)
def test_product_with_a_packed_weight(tokens, dtype, tile, tmp_path, monkeypatch):
    kernel = EmulatedKernel(tile, dtype, tmp_path)
    tiles = []
    monkeypatch.setattr(nf4_linear, "compiled", lambda tokens, *_: tiles.append(tokens) or kernel)
    for rows, columns in SHAPES[: 3 if tile == 8 else 1]:
        x, weight = torch.randn(tokens, columns).to(dtype), torch.randn(rows, columns)
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        for bias in (None, torch.randn(rows).to(dtype)):
            exact = x.float() @ bitsandbytes.functional.dequantize_4bit(packed, state).T
            exact += 0 if bias is None else bias.float()
            found = nf4_linear.nf4_linear(x, packed, state, bias)
            # Table and output are rounded.
            assert (found.float() - exact).norm() < torch.finfo(dtype).eps / 2 * exact.norm()
    assert set(tiles) == {tile}


@pytest.mark.skipif(not cuda_kernel.can_compile(), reason="needs NVRTC")
@pytest.mark.parametrize(
    ("tile", "dtype", "capability"),
    [
        (8, torch.bfloat16, (8, 0)),
        (16, torch.float16, (8, 6)),
        (32, torch.bfloat16, (9, 0)),
        (64, torch.bfloat16, (12, 0)),
    ],
)
def test_compiles_for_gpus(tile, dtype, capability):
    code, name = cuda_kernel.compile_source(nf4_linear.SOURCE, *nf4_linear.kernel_of(tile, dtype), capability)
    assert code.startswith(b"\x7fELF") and name in code


def test_missing_bindings_are_logged(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with caplog.at_level("INFO"):
        assert not cuda_kernel.can_compile.__wrapped__()
    assert "Answers take longer, since CUDA kernels cannot be compiled" in caplog.text


@pytest.mark.skipif(not cuda_kernel.can_compile(), reason="needs NVRTC")
def test_errors_of_a_source_are_shown(tmp_path):
    (tmp_path / "wrong.cu").write_text("__global__ void wrong() { return 1; }")
    with pytest.raises(RuntimeError, match=r"wrong\.cu\(1\): error: return value type"):
        cuda_kernel.compile_source(tmp_path / "wrong.cu", "wrong", {}, (8, 0))
