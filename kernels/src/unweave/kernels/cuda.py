"""CUDA C++ kernels that work on torch's memory, on torch's stream; CuPy compiles them at first use.

A kernel is a template over dtypes in a `.cu` file beside the Python file that launches it. NVRTC
sees `common.cuh` and that file and nothing else, so no CUDA header has to be installed. Kernels
have no barriers: a thread makes whole results, so results do not depend on how many threads there
are. Arguments are pointers, `long long` and `double`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave.kernels.backends import BackendError

TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.int32: "int",
    torch.int64: "long long",
    torch.int8: "signed char",
    torch.uint8: "unsigned char",
}
"""What a dtype is called in CUDA C++."""

COMMON = Path(__file__).with_name("common.cuh")
"""What stands before every kernel."""

OPTIONS = ("-std=c++17",)
"""Options of NVRTC: exact division and square roots, no flushing of small numbers to zero."""

THREADS = 256
"""Threads of a block."""

BLOCKS = 1 << 20
"""The most blocks of a launch; threads go on to further items."""

Argument = Tensor | int | float | None


class Module:
    """The kernels of one `.cu` file, each compiled for its dtypes and device when first launched.

    >>> Module(Path("kernels.cu")).path.name
    'kernels.cu'
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def source(self) -> str:
        """What is compiled."""
        return COMMON.read_text(encoding="utf-8") + self.path.read_text(encoding="utf-8")

    def launch(
        self, kernel: str, dtypes: Sequence[torch.dtype], items: int, *arguments: Argument
    ) -> None:
        """Run `kernel<dtypes>(arguments..., items)`, a thread an item, and do not wait for it.

        Tensors are given as pointers to their first element, in whatever layout they have; None is
        a null pointer. It runs on the current stream of the tensors' device, which therefore also
        orders it with what torch does to them. Raises `BackendError` without CuPy, or for tensors
        on more than one device.
        """
        devices = {argument.device for argument in arguments if isinstance(argument, Tensor)}
        if len(devices) != 1:
            raise BackendError(
                f"{kernel} needs tensors on one device, got {sorted(map(str, devices))}"
            )
        if items:
            name = f"{kernel}<{', '.join(TYPES[dtype] for dtype in dtypes)}>"
            self.run(name, items, (*arguments, items), devices.pop())

    def run(
        self, name: str, items: int, arguments: tuple[Argument, ...], device: torch.device
    ) -> None:
        """Launch an instance of a kernel on `device`."""
        cuda = cupy().cuda
        blocks = min(BLOCKS, -(-items // THREADS))
        index = torch.cuda.current_device() if device.index is None else device.index
        with cuda.Device(index), cuda.Stream.from_external(TorchStream(index)):
            function = _compiled(self.source, name, index)
            function((blocks,), (THREADS,), tuple(_value(argument) for argument in arguments))


class TorchStream:
    """The current stream of torch on a device, by the CUDA stream protocol, for any torch."""

    def __init__(self, index: int) -> None:
        self.stream = torch.cuda.current_stream(index)

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the version of the protocol and the stream's address."""
        return 0, self.stream.cuda_stream


def available() -> bool:
    """Whether CuPy is installed."""
    return find_spec("cupy") is not None


def cupy() -> Any:
    """Return the module CuPy; `BackendError` says how to install it."""
    try:
        return import_module("cupy")
    except ImportError as error:
        raise BackendError(
            'this routine needs CuPy on a GPU: pip install "unweave-kernels[cuda]"'
        ) from error


@cache
def _compiled(source: str, name: str, index: int) -> Any:
    """Return the function `name` of the source for the device `index`, which is the current one."""
    module = cupy().RawModule(code=source, options=OPTIONS, name_expressions=(name,))
    return module.get_function(name)


def _value(argument: Argument) -> int | float:
    """Return an address, a whole number or a float, which CuPy passes in eight bytes each."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return 0 if argument is None else argument
