"""CUDA sources compile for GPUs, with NVIDIA's compilers from PyPI, and use no more than registers.

No GPU and no driver is needed. `pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-nvcc-cu12` brings
NVRTC and ptxas.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest

from unweave.kernels import cuda

ARCHITECTURES = ("80", "90")


def in_wheels(pattern):
    """Return the first file that a wheel of NVIDIA put under `nvidia`."""
    for folder in sys.path:
        for path in sorted(Path(folder or ".").glob(f"nvidia/*/{pattern}")):
            return path
    return None


NVRTC, PTXAS = in_wheels("lib/libnvrtc.so.[0-9]*"), in_wheels("bin/ptxas")
needs_nvrtc = pytest.mark.skipif(NVRTC is None, reason="no nvidia-cuda-nvrtc-cu12")
needs_ptxas = pytest.mark.skipif(PTXAS is None, reason="no nvidia-cuda-nvcc-cu12")


def compiled(source, names, architecture):
    """Return the PTX of all instances; AssertionError with the log where it does not compile."""
    nvrtc, program = ctypes.CDLL(str(NVRTC)), ctypes.c_void_p()
    options = [*cuda.OPTIONS, f"--gpu-architecture=compute_{architecture}"]
    flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    made = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None
    )
    assert made == 0
    try:
        for name in names:
            assert nvrtc.nvrtcAddNameExpression(program, name.encode()) == 0
        status = nvrtc.nvrtcCompileProgram(program, len(options), flags)
        log = text_of(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        assert status == 0 and "warning" not in log, log
        return text_of(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def assembled(ptx, architecture, folder):
    """Return what ptxas says about PTX."""
    (folder / "kernels.ptx").write_text(ptx)
    arguments = "-v", f"-arch=sm_{architecture}", "kernels.ptx", "-o", "kernels.cubin"
    done = subprocess.run(
        [str(PTXAS), *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def text_of(size_of, text_into, program):
    size = ctypes.c_size_t()
    assert size_of(program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert text_into(program, text) == 0
    return text.value.decode()


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_instance_compiles_without_warnings_or_spills(kernels, architecture, tmp_path):
    source, names = kernels
    ptx = compiled(source, names, architecture)
    assert ptx.count(".entry ") == len(names)
    assert "bar.sync" not in ptx and "atom." not in ptx and "red." not in ptx
    if PTXAS is None:
        pytest.skip("no nvidia-cuda-nvcc-cu12: compiled, but spills are not known")
    report = assembled(ptx, architecture, tmp_path)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert len(spilled) == 2 * len(names) and not any(map(int, spilled)), report


@needs_nvrtc
def test_an_error_in_a_source_is_found():
    with pytest.raises(AssertionError, match="undefined"):
        compiled("template <typename T> __global__ void f(T* x) { *x = y; }", ["f<float>"], "80")


@needs_nvrtc
@needs_ptxas
def test_spills_would_be_found(tmp_path):
    source = """
    extern "C" __global__ void __launch_bounds__(1024, 2) f(float* x) {
        float kept[60];
        #pragma unroll
        for (int i = 0; i < 60; ++i) kept[i] = x[i * 32];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 60; ++i) x[i] = kept[59 - i];
    }"""
    report = assembled(compiled(source, [], "80"), "80", tmp_path)
    assert any(map(int, re.findall(r"(\d+) bytes spill stores", report))), report


def test_places_are_counted_in_64_bits(kernels):
    source, _ = kernels
    kernel_part = source.split("return (unsigned)whole / (unsigned)b;")[1]
    assert not re.search(r"\b(int|long|unsigned) \w+ =", kernel_part)
