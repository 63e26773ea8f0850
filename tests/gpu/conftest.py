"""The GPU that tests run on: a simulated one everywhere, a real one with ``-m gpu``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dsml_gpu.memory.backend import BackendUnavailable, select_backends
from tests.support import simulated_server
from tests.support.kernels_on_cpu import build_kernels, load_launcher
from tests.support.processes import COMMAND
from tests.support.simulated_cuda import Launcher, SimulatedCupy

#: They hold CuPy and what was compiled with it.
_MODULES = ("dsml_gpu.memory.cuda", "dsml_gpu.reduction.cuda")


@dataclass(frozen=True)
class Gpu:
    """CuPy, real or simulated.

    Attributes:
        simulated: the simulation; None on a real GPU.
    """

    cupy: Any
    simulated: SimulatedCupy | None


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """One GPU of 1 GiB, or the real one."""
    if request.param == "real":
        yield real_gpu()
    else:
        yield from simulated_gpus(request.getfixturevalue("launcher"), monkeypatch, 1)


@pytest.fixture
def two_gpus(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Two simulated GPUs, neither of which can read the other's memory in a kernel."""
    yield from simulated_gpus(launcher, monkeypatch, 2)


def real_gpu() -> Gpu:
    """The machine's GPU; skips the test where there is none."""
    try:
        select_backends("cupy")
    except BackendUnavailable as reason:
        pytest.skip(f"needs CuPy and a CUDA GPU: {reason}")
    import cupy

    return Gpu(cupy, None)


def simulated_gpus(launcher: Launcher, monkeypatch: pytest.MonkeyPatch, count: int) -> Iterator[Gpu]:
    cupy = SimulatedCupy(launcher, count)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cupy", cupy)
        for name in _MODULES:
            patch.delitem(sys.modules, name, raising=False)
        yield Gpu(cupy, cupy)
        for name in _MODULES:
            sys.modules.pop(name, None)
        cupy.end()


@pytest.fixture(scope="session")
def kernels_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the kernels, compiled for the CPU."""
    return build_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="session")
def launcher(kernels_on_cpu: Path) -> Launcher:
    """Runs the real kernels on the CPU."""
    return load_launcher(kernels_on_cpu)


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.gpu)])
def command(request: pytest.FixtureRequest) -> Sequence[str]:
    """The command ``dsml-gpu`` for processes of their own that have a GPU."""
    if request.param == "real":
        real_gpu()
        return COMMAND
    program = Path(simulated_server.__file__)
    return (sys.executable, str(program), str(request.getfixturevalue("kernels_on_cpu")))
