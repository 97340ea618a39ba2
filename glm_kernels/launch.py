"""Launches Triton kernels with little host time.

`kernel[grid](...)` inspects every argument of every launch to find the compiled kernel for it. That takes tens of
microseconds on the host, as long as one of the kernels here runs on the GPU, so that with a small batch the GPU waits
for the host. `launch` keeps compiled kernels under a key that is cheaper to compute, and calls them directly.
"""

import torch
from triton.runtime import JITFunction
from triton.runtime.jit import KernelParam

compiled_kernels: dict = {}  # key of `launch` -> compiled kernel


def launch(kernel, grid: tuple[int, ...], *args, **constants):
    """Launches `kernel[grid](*args, **constants)`; compiles it first if no compiled kernel fits the arguments.

    Args:
        kernel: function under `triton.jit`; its parameters are those of `args`, followed by its constexpr parameters.
        grid: number of programs in each dimension, one to three dimensions.
        args: the run-time arguments; the first is a tensor. Integers under `do_not_specialize` are below 2**31: their
            key does not tell 32-bit from 64-bit integers.
        constants: constexpr parameters, and Triton's options such as num_warps and num_stages.
    """
    if not isinstance(kernel, JITFunction):  # Triton's interpreter, which compiles nothing
        return kernel[grid](*args, **constants)
    keys = [specialization_key(arg, parameter) for arg, parameter in zip(args, kernel.params, strict=False)]
    key = (id(kernel), args[0].get_device(), *keys, *constants.items())
    compiled = compiled_kernels.get(key)
    if compiled is None:
        compiled_kernels[key] = kernel[grid](*args, **constants)
    else:
        # A compiled kernel takes the constexpr parameters too, by position and without the options.
        constexprs = (constants[name] for name in kernel.arg_names[len(args) :])
        compiled[(*grid, 1, 1)[:3]](*args, *constexprs)


def specialization_key(arg: torch.Tensor | float | int, parameter: KernelParam) -> tuple | type | int:
    """The property of an argument that a kernel is compiled for.

    Args:
        arg: a run-time argument: tensor, float or int.
        parameter: the kernel's parameter for it, of `JITFunction.params`.
    Returns:
        Of a tensor its dtype and its address modulo 16, of a float or an int under `do_not_specialize` its type, of
        any other int its value, because Triton specializes on 1 and on multiples of 16.
    """
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16
    if parameter.do_not_specialize or isinstance(arg, float):
        return type(arg)
    return arg
