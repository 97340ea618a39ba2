"""A compiled kernel is launched again for arguments with the same specialization key, and for no others."""

from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="no Triton here: no kernels are launched")

import torch

from glm_kernels import launch as kernel_launch
from glm_kernels.launch import launch

NUMBERS = torch.zeros(64)


class StandInKernel:
    """In place of a JITFunction: counts compilations and records the launches of compiled kernels."""

    arg_names = ["x", "scale", "tokens", "hidden_size", "BLOCK", "GRADIENT"]
    params = [SimpleNamespace(do_not_specialize=name == "tokens") for name in arg_names]

    def __init__(self):
        self.compiled, self.launches = 0, []

    def __getitem__(self, grid):
        def compile_and_launch(*args, **constants):
            self.compiled += 1
            return Compiled(self, self.compiled)

        return compile_and_launch


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


def test_kernel_is_compiled_once_for_arguments_with_the_same_key(kernel):
    launch(kernel, (3,), NUMBERS, 0.5, 7, 64, GRADIENT=True, BLOCK=16, num_warps=8)
    assert not kernel.launches
    launch(kernel, (4, 2), NUMBERS[4:], 1.5, 16, 64, GRADIENT=True, BLOCK=16, num_warps=8)
    ((number, grid, args),) = kernel.launches
    assert (kernel.compiled, number, grid) == (1, 1, (4, 2, 1))
    assert args[0].data_ptr() == NUMBERS[4:].data_ptr()
    assert args[1:] == (1.5, 16, 64, 16, True)  # constexpr parameters in the kernel's order, without options


@pytest.mark.parametrize(
    ("x", "hidden_size", "constants"),
    [
        (NUMBERS[1:], 64, {}),  # the address is not a multiple of 16 bytes
        (NUMBERS.half(), 64, {}),
        (NUMBERS, 32, {}),
        (NUMBERS, 64, {"BLOCK": 32}),
        (NUMBERS, 64, {"num_warps": 4}),
    ],
)
def test_kernel_is_compiled_anew_for_arguments_with_another_key(kernel, x, hidden_size, constants):
    usual = {"BLOCK": 16, "GRADIENT": True, "num_warps": 8}
    for _ in range(2):
        launch(kernel, (1,), NUMBERS, 0.5, 7, 64, **usual)
        launch(kernel, (1,), x, 0.5, 7, hidden_size, **usual | constants)
    assert kernel.compiled == 2
    assert [number for number, _, _ in kernel.launches] == [1, 2]


class TensorOn(torch.Tensor):
    """A tensor with another device number."""

    device_number = 0

    def get_device(self) -> int:
        return self.device_number


def test_each_kernel_and_each_device_has_a_compiled_kernel_of_its_own(kernel):
    other, constants = StandInKernel(), {"BLOCK": 16, "GRADIENT": True}
    tensors = [NUMBERS.as_subclass(TensorOn) for _ in range(2)]
    tensors[1].device_number = 1
    for _ in range(2):
        for rows in (NUMBERS, *tensors):
            launch(kernel, (1,), rows, 0.5, 7, 64, **constants)
        launch(other, (1,), NUMBERS, 0.5, 7, 64, **constants)
    assert (kernel.compiled, other.compiled) == (3, 1)
    assert [number for number, _, _ in kernel.launches] == [1, 2, 3]
    assert [number for number, _, _ in other.launches] == [1]
