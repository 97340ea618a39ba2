"""Compiled kernels are launched for the arguments they were compiled for, and for no others."""

from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="no Triton here: no kernels are launched")

import torch

from glm_kernels import launch as kernel_launch
from glm_kernels.launch import launch

NUMBERS = torch.zeros(64)


class StandInKernel:
    """In place of a JITFunction: notes every launch, those through Triton and those of what it compiled."""

    arg_names = ["rows", "factor", "tokens", "columns", "BLOCK", "GRADIENT"]
    params = [SimpleNamespace(do_not_specialize=name == "tokens") for name in arg_names]

    def __init__(self):
        self.compiled, self.launches = 0, []

    def __getitem__(self, grid):
        def through_triton(*args, **constants):
            self.compiled += 1
            return Compiled(self, self.compiled)

        return through_triton


class Compiled:
    def __init__(self, kernel, number):
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid):
        return lambda *args: self.kernel.launches.append((self.number, grid, args))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(kernel_launch, "JITFunction", StandInKernel)
    monkeypatch.setattr(kernel_launch, "compiled_kernels", {})
    return StandInKernel()


def test_arguments_of_the_same_kind_are_compiled_for_once(kernel):
    launch(kernel, (3,), NUMBERS, 0.5, 7, 64, GRADIENT=True, BLOCK=16, num_warps=8)
    assert not kernel.launches
    launch(kernel, (4, 2), NUMBERS[4:], 1.5, 16, 64, GRADIENT=True, BLOCK=16, num_warps=8)
    ((number, grid, args),) = kernel.launches
    assert (kernel.compiled, number, grid) == (1, 1, (4, 2, 1))
    assert args[0].data_ptr() == NUMBERS[4:].data_ptr()
    assert args[1:] == (1.5, 16, 64, 16, True)  # constants in the kernel's order, options not among them


@pytest.mark.parametrize(
    ("rows", "columns", "constants"),
    [
        (NUMBERS[1:], 64, {}),  # not at a multiple of 16 bytes
        (NUMBERS.half(), 64, {}),
        (NUMBERS, 32, {}),
        (NUMBERS, 64, {"BLOCK": 32}),
        (NUMBERS, 64, {"num_warps": 4}),
    ],
)
def test_arguments_of_another_kind_are_compiled_for(kernel, rows, columns, constants):
    usual = {"BLOCK": 16, "GRADIENT": True, "num_warps": 8}
    for _ in range(2):
        launch(kernel, (1,), NUMBERS, 0.5, 7, 64, **usual)
        launch(kernel, (1,), rows, 0.5, 7, columns, **usual | constants)
    assert kernel.compiled == 2
    assert [number for number, _, _ in kernel.launches] == [1, 2]
