"""Kernels in CUDA C++, compiled for the GPU at hand when they are first used.

For what Triton has no means for, such as tables in shared memory. NVRTC, which compiles them in about half a second,
and NVIDIA's bindings of it and of the driver come with PyTorch for CUDA on Linux.
"""

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


@functools.cache
def can_compile() -> bool:
    """Whether NVIDIA's bindings and NVRTC are installed; if they are not, the log says so."""
    try:
        from cuda.bindings import nvrtc

        checked(nvrtc.nvrtcVersion())
    except (ImportError, RuntimeError) as error:  # of Python, of the bindings if the library is missing
        logger.info("Answers take longer, since CUDA kernels cannot be compiled: %s", error)
        return False
    return torch.version.hip is None


def checked(result: tuple) -> Any:
    """The values, or the one value, that a function of the bindings returned after its error code.

    Raises:
        RuntimeError: the code says that it failed.
    """
    error, *values = result
    if error:
        raise RuntimeError(str(error))
    return values[0] if len(values) == 1 else values


def compile_source(
    path: Path, kernel: str, macros: dict[str, str], capability: tuple[int, int]
) -> tuple[bytes, bytes]:
    """Compiles a kernel; needs no GPU.

    Args:
        path: of the source.
        kernel: its name in C++, with the arguments of a template.
        macros: name -> value.
        capability: compute capability of the GPU.
    Returns:
        The program for the GPU, and the kernel's name in it.
    Raises:
        RuntimeError: it has errors, which are the message.
    """
    from cuda.bindings import nvrtc

    program = checked(nvrtc.nvrtcCreateProgram(path.read_bytes(), path.name.encode(), 0, [], []))
    checked(nvrtc.nvrtcAddNameExpression(program, kernel.encode()))
    options = ["--std=c++17", "--gpu-architecture=sm_{}{}".format(*capability)]
    options += [f"-D{name}={value}" for name, value in macros.items()]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if error:
        log = bytes(checked(nvrtc.nvrtcGetProgramLogSize(program)))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(log.rstrip(b"\0").decode())
    code = bytes(checked(nvrtc.nvrtcGetCUBINSize(program)))
    checked(nvrtc.nvrtcGetCUBIN(program, code))
    return code, checked(nvrtc.nvrtcGetLoweredName(program, kernel.encode()))


class CudaKernel:
    """A kernel on the present device.

    Args:
        path, kernel, macros: see `compile_source`.
        threads: of a program.
    Attributes:
        most_programs: that the GPU runs at once.
    """

    def __init__(self, path: Path, kernel: str, macros: dict[str, str], threads: int):
        from cuda.bindings import driver

        code, name = compile_source(path, kernel, macros, torch.cuda.get_device_capability())
        self.function = checked(driver.cuModuleGetFunction(checked(driver.cuModuleLoadData(code)), name))
        self.threads = threads
        programs = checked(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self.function, threads, 0))
        self.most_programs = programs * torch.cuda.get_device_properties().multi_processor_count

    def __call__(self, programs: int, *arguments: torch.Tensor | int):
        """Launches programs on the present stream; tensors are passed as pointers, integers as `int`."""
        from cuda.bindings import driver

        is_tensor = [isinstance(argument, torch.Tensor) for argument in arguments]
        values = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
        types = tuple(ctypes.c_void_p if pointer else ctypes.c_int for pointer in is_tensor)
        stream = torch.cuda.current_stream().cuda_stream
        checked(
            driver.cuLaunchKernel(self.function, programs, 1, 1, self.threads, 1, 1, 0, stream, (values, types), 0)
        )
