"""Kernels compiled by the host's C++ compiler, and launches of them in a child process."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dsml_gpu.reduction.kernels import ARGUMENTS, Launch

HERE = Path(__file__).parent / "cpu"

#: No contraction to fused multiply-add, as on the GPU. Bytes are accessed as several types, as CUDA allows.
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing")
WARNINGS = (
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-warning-option",  # each compiler knows some of these only
    "-Wno-unknown-pragmas",  # `#pragma unroll`
    "-Wno-pass-failed",  # Clang's, of a loop that it does not unroll although asked to
    "-Wno-maybe-uninitialized",  # GCC's: that a launch has at least one source no compiler can know
)
#: -O0 replaces -O1: it compiles several times faster. Dividing floating-point numbers by zero is defined, by IEEE 754.
SANITIZE = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=float-divide-by-zero", "-fno-sanitize-recover=all")

#: `struct Header` of launcher.cpp.
HEADER = np.dtype(
    [
        ("kernel", "S64"),
        ("arguments", ARGUMENTS),
        ("blocks", "<u4"),
        ("threads", "<u4"),
        ("backwards", "<u4"),
        ("buffers", "<u4"),
    ]
)


@dataclass(frozen=True)
class Grid:
    """How a kernel is launched.

    Attributes:
        blocks, threads: number of blocks, and of threads of each.
        backwards: threads run from the last to the first. They run one after the other, and no order may matter.
    """

    blocks: int
    threads: int
    backwards: bool = False


class Crashed(AssertionError):
    """A launch ended the process, or a sanitizer did; the message has what it said."""


def address(buffer: int, offset: int) -> int:
    """What stands for a place in a buffer until the buffers have addresses; buffers start at multiples of 64."""
    return (buffer + 1) << 32 | offset


def compiler() -> str:
    """The host's C++ compiler; skips the test where there is none."""
    for name in ("g++", "c++", "clang++"):
        if found := shutil.which(name):
            return found
    pytest.skip("no C++ compiler here: none of g++, c++ and clang++ is on the path")


@functools.cache
def sanitizes() -> bool:
    """Whether the compiler's address sanitizer finds a write behind an allocation: some have it in name only."""
    code = b"int main(int one, char**) { char* byte = new char[1]; byte[one] = 0; delete[] byte; }"
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/program"
        command = [compiler(), "-x", "c++", *SANITIZE, "-o", program, "-"]
        if subprocess.run(command, input=code, capture_output=True, timeout=60, check=False).returncode != 0:
            return False
        done = subprocess.run([program], capture_output=True, timeout=60, check=False)
        return b"AddressSanitizer" in done.stderr


def build(out: Path, kernels: Path, name_expressions: Iterable[str], flags: Sequence[str] = ()) -> Program:
    """Compile the launcher with these instantiations.

    Args:
        out: folder for what is built; made here.
        kernels: the folder that has reduce.cu.
        flags: beside `FLAGS` and `WARNINGS`.
    """
    objects = _compile([HERE / "launcher.cpp", HERE / "shared.cpp"], out, kernels, name_expressions, flags)
    program = out / "launcher"
    call([compiler(), *flags, *objects, "-o", str(program)])
    return Program(program)


def build_library(out: Path, kernels: Path, name_expressions: Iterable[str]) -> Path:
    """Compile a shared library with these instantiations, for ctypes; shared.cpp has the function.

    Args:
        out, kernels: as for `build`.
    """
    objects = _compile([HERE / "shared.cpp"], out, kernels, name_expressions, ["-fPIC"])
    library = out / "kernels.so"
    call([compiler(), "-shared", *objects, "-o", str(library)])
    return library


def _compile(
    own: Sequence[Path], out: Path, kernels: Path, name_expressions: Iterable[str], flags: Sequence[str]
) -> list[str]:
    """Compile the instantiations, a file for each type, and files of this folder; return the object files."""
    out.mkdir(parents=True)
    by_type: dict[str, list[str]] = defaultdict(list)
    for name in sorted(set(name_expressions)):
        by_type[name.partition(",")[0]].append(name)
    units = list(own)
    for number, names in enumerate(by_type.values()):
        rows = "".join(f'    {{"{name}", {name}}},\n' for name in names)
        units.append(out / f"type{number}.cpp")
        units[-1].write_text(f'#include "launcher.h"\nstatic const Registration table[] = {{\n{rows}}};\n')

    includes = ("-I", str(kernels), "-I", str(HERE))
    objects = [out / f"{unit.stem}.o" for unit in units]

    def compile_unit(unit: Path, object_file: Path) -> None:
        call([compiler(), *FLAGS, *WARNINGS, *flags, *includes, "-c", str(unit), "-o", str(object_file)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_unit, units, objects))
    return list(map(str, objects))


def call(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\nexited {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout


@dataclass(frozen=True)
class Program:
    """A launcher."""

    path: Path

    def layout(self) -> dict[str, tuple[int, ...]]:
        """Offset and size of each field of ``struct ReduceArguments``, and the value of each constant."""
        lines = (line.split() for line in call([str(self.path), "layout"]).splitlines())
        return {name: tuple(map(int, numbers)) for name, *numbers in lines}

    def run(self, launches: Sequence[tuple[Launch, Grid, Sequence[np.ndarray]]]) -> list[list[np.ndarray]]:
        """Launch one after the other, in one process.

        Args:
            launches: each with its grid and its buffers (uint8), in which the addresses of the launch are (`address`).

        Returns:
            The buffers after each launch.

        Raises:
            Crashed: a launch did not come to its end, or a sanitizer had something to report.
        """
        stdin = bytearray()
        for launch, grid, buffers in launches:
            header = np.zeros((), HEADER)
            header["kernel"] = launch.kernel
            header["arguments"] = launch.arguments[0]
            header["blocks"], header["threads"], header["backwards"] = grid.blocks, grid.threads, grid.backwards
            header["buffers"] = len(buffers)
            stdin += header.tobytes() + np.array([buffer.size for buffer in buffers], "<u8").tobytes()
            for buffer in buffers:
                stdin += buffer.data
        # What is not given back is of no interest here, and looking for it is not allowed in every container.
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
        command = [str(self.path), "run"]
        done = subprocess.run(command, input=stdin, env=environment, capture_output=True, timeout=100, check=False)
        sizes = [[buffer.size for buffer in buffers] for _, _, buffers in launches]
        ends = np.cumsum([sum(each) for each in sizes])
        if done.returncode != 0 or done.stderr:
            number = min(int(np.searchsorted(ends, len(done.stdout), side="right")), len(launches) - 1)
            said = done.stderr.decode(errors="replace")
            raise Crashed(f"exit status {done.returncode} in launch {number} of {launches[number][0].kernel}\n{said}")
        assert len(done.stdout) == ends[-1]
        after = np.split(np.frombuffer(done.stdout, np.uint8), ends[:-1])
        return [np.split(whole, np.cumsum(each)[:-1]) for whole, each in zip(after, sizes, strict=True)]
