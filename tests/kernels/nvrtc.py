"""NVRTC, NVIDIA's run-time compiler, as a library of its own: no driver, no GPU, no CuPy."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class NotInstalled(Exception):
    """There is no NVRTC here; the message says where it was looked for."""


class CompileError(Exception):
    """NVRTC refused; the message has its log."""


@dataclass(frozen=True)
class Compiled:
    """What came of a compilation.

    Attributes:
        code: a cubin, which is an ELF file, or PTX, which is text.
        lowered_names: name expression -> the name of the function in the code.
        log: everything that was said, warnings too.
    """

    code: bytes
    lowered_names: dict[str, str]
    log: str


@functools.cache
def library() -> ctypes.CDLL:
    """NVRTC of the wheel ``nvidia-cuda-nvrtc``, or of the conda environment that this Python is of.

    Raises:
        NotInstalled
    """
    names = ("libnvrtc.so.*", "nvrtc64_*.dll")
    try:
        files = importlib.metadata.files("nvidia-cuda-nvrtc") or []
        found = [Path(str(file.locate())) for file in files if any(file.match(name) for name in names)]
    except importlib.metadata.PackageNotFoundError:
        found = sorted(Path(sys.prefix, "lib").glob(names[0]))
    for path in found:
        nvrtc = ctypes.CDLL(str(path))
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        return nvrtc
    raise NotInstalled(
        "neither the package nvidia-cuda-nvrtc, which the dev extra has on Linux, nor conda's cuda-nvrtc is here"
    )


def supported_architectures() -> list[int]:
    """The numbers of ``sm_NN``."""
    count = ctypes.c_int()
    _call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    _call("nvrtcGetSupportedArchs", numbers)
    return list(numbers)


def compile_source(source: str, name_expressions: Sequence[str], options: Sequence[str], output: str = "CUBIN") -> Compiled:
    """Compile some instantiations of a text. Other threads run meanwhile.

    Args:
        options: name a real architecture (sm_NN) for a cubin, a virtual one (compute_NN) for PTX.
        output: ``"CUBIN"`` or ``"PTX"``.

    Raises:
        CompileError
    """
    program = ctypes.c_void_p()
    _call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"reduce.cu", 0, None, None)
    try:
        for name in name_expressions:
            _call("nvrtcAddNameExpression", program, name.encode())
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            _call("nvrtcCompileProgram", program, len(options), given)
        except CompileError as error:
            raise CompileError(f"{error}\n{_text('ProgramLog', program)}") from None
        return Compiled(_bytes(output, program), _lowered(program, name_expressions), _text("ProgramLog", program))
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))


def _call(function: str, *arguments: object) -> None:
    status = getattr(library(), function)(*arguments)
    if status != 0:
        raise CompileError(f"{function}: {library().nvrtcGetErrorString(status).decode()}")


def _bytes(what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _call(f"nvrtcGet{what}", program, buffer)
    return buffer.raw


def _text(what: str, program: ctypes.c_void_p) -> str:
    return _bytes(what, program).rstrip(b"\0").decode(errors="replace")


def _lowered(program: ctypes.c_void_p, name_expressions: Sequence[str]) -> dict[str, str]:
    lowered = {}
    for name in name_expressions:
        pointer = ctypes.c_char_p()
        _call("nvrtcGetLoweredName", program, name.encode(), ctypes.byref(pointer))
        lowered[name] = (pointer.value or b"").decode()
    return lowered
