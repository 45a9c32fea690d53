"""CUDA kernels without a GPU: their sources compiled for a CPU, and all their instances."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from torch._library.custom_ops import CustomOpDef

from unweave.kernels import attention, codes, cuda, graph, groupwise, sparse

SOURCES = sorted(Path(cuda.__file__).parent.rglob("*.cu"))

PARAMETERS = {
    "T": ("float", "double", "Half", "BFloat16"),
    "A": ("float", "double"),
    "I": ("int", "long long"),
    "J": ("int", "long long"),
}
"""What stands for each template parameter; kernels keep to these names."""

GUARD = 64
"""Bytes before and after each tensor that a kernel must not write."""


@pytest.fixture
def on_cpu(monkeypatch, tmp_path_factory):
    """Run kernels on CPU tensors, from their own source.

    It shows that what the source says is right: arguments, places, arithmetic, conversions, no
    write outside of outputs, and no thread that needs what another one writes. It cannot show what
    a GPU adds: races, alignment, fused multiply-add, its own exponential, limits of a launch,
    streams. Every output is filled with ones, which are NaN or -1, before it is written.
    """
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.getbasetemp()

    def run(self, name, items, arguments, device):
        assert device.type == "cpu"
        run_guarded(library(self.path, folder), name, arguments)

    monkeypatch.setattr(cuda.Module, "run", run)
    monkeypatch.setattr(cuda, "available", lambda: True)
    return lambda module: library(module.path, folder)


@cache
def library(path, folder):
    """Compile a file of kernels for the CPU."""
    names = instances(path.read_text())
    calls = "".join(
        f"""
extern "C" void run_{place}(unsigned first, unsigned last, unsigned blocks, unsigned threads,
    bool backwards, void** values) {{
    run(&{name}, first, last, blocks, threads, backwards, values);
}}
extern "C" void signature_{place}(char* into) {{ strcpy(into, signature(&{name}).c_str()); }}
"""
        for place, name in enumerate(names)
    )
    shim = Path(__file__).with_name("cuda_on_cpu.hpp").read_text()
    source = folder / f"{path.parent.name}.cpp"
    source.write_text(shim + cuda.Module(path).source + calls)
    built = source.with_suffix(".so")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    done = subprocess.run(
        ["g++", *flags, str(source), "-o", str(built)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return Library(ctypes.CDLL(str(built)), names)


class Library:
    """The instances of the kernels of one file, on a CPU."""

    def __init__(self, built, names):
        self.built, self.names = built, names

    def run(self, name, arguments, part, threads, backwards=False):
        """Run the blocks `part` = (first, last, of) of a grid."""
        values = [_boxed(argument) for argument in arguments]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        first, last, blocks = (ctypes.c_uint(number) for number in part)
        run = getattr(self.built, f"run_{self.names.index(name)}")
        run(first, last, blocks, ctypes.c_uint(threads), ctypes.c_bool(backwards), places)

    def signature(self, name):
        """Return the types of a kernel's arguments."""
        text = ctypes.create_string_buffer(4096)
        getattr(self.built, f"signature_{self.names.index(name)}")(text)
        return text.value.decode().rstrip(",").split(",")


def run_guarded(library, name, arguments):
    """Run all threads of a small grid, forwards and backwards, on guarded copies of all tensors."""
    types = library.signature(name)
    assert len(types) == len(arguments), (name, types)
    for kind, argument in zip(types, arguments, strict=True):
        assert _fits(kind, argument), f"{name}: {argument!r} is given for {kind}"
    ends = []
    for backwards in (False, True):
        copies = [
            _Guarded(x, kind) if isinstance(x, torch.Tensor) else x
            for x, kind in zip(arguments, types, strict=True)
        ]
        given = [x.start if isinstance(x, _Guarded) else x for x in copies]
        library.run(name, given, (0, 3, 3), 32, backwards)
        ends.append([x for x in copies if isinstance(x, _Guarded)])
        for copy in ends[-1]:
            copy.check(name)
    for forward, backward in zip(*ends, strict=True):
        assert torch.equal(forward.whole, backward.whole), f"{name}: the order of threads shows"
        forward.give_back()


class _Guarded:
    """A copy of the memory of a tensor between guards; of an output, all ones."""

    def __init__(self, x, kind):
        self.x, self.kind = x, kind
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        self.flat = x.as_strided((extent if x.numel() else 0,), (1,), x.storage_offset())
        self.bytes = self.flat.numel() * x.itemsize
        self.whole = torch.full((self.bytes + 2 * GUARD,), 255, dtype=torch.uint8)
        self.inside = self.whole[GUARD : GUARD + self.bytes].view(x.dtype)
        if kind.startswith("const "):
            self.inside.copy_(self.flat)
        else:
            assert x.is_contiguous()

    @property
    def start(self):
        return self.whole.data_ptr() + GUARD

    def check(self, name):
        outside = torch.cat([self.whole[:GUARD], self.whole[GUARD + self.bytes :]])
        assert (outside == 255).all(), f"{name} wrote outside of a {self.kind}"

    def give_back(self):
        if not self.kind.startswith("const "):
            self.flat.copy_(self.inside)


def _boxed(argument):
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    if isinstance(argument, torch.Tensor):
        argument = argument.data_ptr()
    return ctypes.c_longlong(argument or 0)


def _fits(kind, argument):
    if isinstance(argument, torch.Tensor):
        return kind.removeprefix("const ") == f"{cuda.TYPES[argument.dtype]}*"
    if argument is None:
        return kind.endswith("*")
    return kind == ("double" if isinstance(argument, float) else "long long")


def instances(source):
    """Return all instances of the kernels of a source, as `kernel<type, ...>`."""
    found = re.findall(r"template <(.*?)>\s*__global__ void (\w+)\(", source)
    assert len(found) == source.count("__global__")
    return [
        f"{kernel}<{', '.join(types)}>"
        for parameters, kernel in found
        for types in itertools.product(
            *(PARAMETERS[name.split()[-1]] for name in parameters.split(","))
        )
    ]


@pytest.fixture(params=SOURCES, ids=lambda path: path.parent.name)
def kernels(request):
    """Each file of kernels: its source as it is compiled, and its instances."""
    path = request.param
    return cuda.Module(path).source, instances(path.read_text())


@pytest.fixture
def gpu_forms(on_cpu, monkeypatch):
    """Let every operator that has a form for GPUs run it on CPU tensors."""
    for module in (attention.ops, codes.ops, graph.ops, groupwise.ops, sparse.ops):
        for operator in vars(module).values():
            if isinstance(operator, CustomOpDef):
                forms = operator._backend_fns
                monkeypatch.setitem(forms, None, forms.get("cuda", forms[None]))
