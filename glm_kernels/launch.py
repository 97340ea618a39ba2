"""Launching Triton kernels with little work for the host.

Triton looks at every argument of every launch to see which compiled kernel it needs. The kernels here run for tens
of microseconds, and so does that: a small batch then waits for the host. What was compiled for arguments of the same
kind is launched directly instead.
"""

import torch
from triton.runtime import JITFunction

compiled_kernels: dict = {}


def launch(kernel, grid: tuple[int, ...], *args, **constants):
    """`kernel[grid](*args, **constants)`.

    Args:
        kernel: under `triton.jit`; its parameters are those of `args` and then its compile-time constants.
        grid: numbers of programs, one to three.
        args: of which the first is a tensor. Integers that the kernel is not compiled anew for are below 2**31.
        constants: compile-time constants and options such as num_warps.
    """
    if not isinstance(kernel, JITFunction):  # Triton's interpreter
        return kernel[grid](*args, **constants)
    kinds = [kind_of(arg, parameter) for arg, parameter in zip(args, kernel.params, strict=False)]
    key = (id(kernel), args[0].get_device(), *kinds, *constants.items())
    compiled = compiled_kernels.get(key)
    if compiled is None:
        compiled_kernels[key] = kernel[grid](*args, **constants)
    else:
        compile_time = (constants[name] for name in kernel.arg_names[len(args) :])
        compiled[(*grid, 1, 1)[:3]](*args, *compile_time)


def kind_of(arg, parameter):
    """What a kernel is compiled for: type and alignment of a tensor, type of a float, value of an integer."""
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16
    if parameter.do_not_specialize or isinstance(arg, float):
        return type(arg)
    return arg
