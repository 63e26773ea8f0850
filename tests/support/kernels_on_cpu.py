"""The kernels as a library of this process, compiled for the CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from dsml_gpu.reduction import kernels
from tests.kernels.on_cpu import build_library
from tests.support.simulated_cuda import Launcher


def build_kernels(folder: Path) -> Path:
    """Compiles all instantiations; skips the test where there is no C++ compiler."""
    names = [name for family in kernels.instantiations().values() for name in family]
    return build_library(folder / "on_cpu", kernels.directory(), names)


def load_launcher(library: Path) -> Launcher:
    """Launches the kernels of a library."""
    loaded = ctypes.CDLL(str(library))

    def launch(name: str, arguments: np.ndarray, blocks: int, threads: int) -> None:
        status = loaded.launch(name.encode(), ctypes.c_void_p(arguments.ctypes.data), blocks, threads)
        assert status == 0, f"no kernel {name}"

    return launch
