"""The real CuPy on a machine without a GPU: it is installed, and what is missing is said in one line."""

from __future__ import annotations

import ast
import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, Distribution, clean_variables, make_environment, run

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="CuPy has wheels for Linux only, of those that the package runs on"),
]

#: Names by which a module has CuPy.
CUPY = ("cp", "cupy")
#: What the package uses of CuPy's objects. What it uses of its modules is read from the code.
OF_OBJECTS = (
    "RawModule.get_function",
    "asnumpy",
    "cuda.Device.attributes",
    "cuda.Device.id",
    "cuda.Event.done",
    "cuda.Event.synchronize",
    "cuda.MemoryPointer.ptr",
    "cuda.Stream.null.ptr",
    "cuda.Stream.record",
    "cuda.Stream.synchronize",
    "cuda.Stream.wait_event",
    "from_dlpack",
    "ndarray.data",
    "ndarray.device",
    "ndarray.nbytes",
)

#: Prints those of its arguments that CuPy has not.
MISSING = """
import functools, sys
import cupy
for name in sys.argv[1:]:
    try:
        functools.reduce(getattr, name.split("."), cupy)
    except AttributeError:
        print(name)
"""


def gpus() -> int:
    """How many GPUs the driver finds; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


@pytest.fixture(scope="module")
def programs(distribution: Distribution, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and with CuPy but not the CUDA toolkit, which is twenty times the size."""
    (cupy,) = distribution.required_by("cuda13")
    return make_environment(tmp_path_factory.mktemp("cupy") / "env", [distribution.wheel, f"{cupy.name}{cupy.specifier}"])


@pytest.fixture
def no_gpu() -> None:
    if found := gpus():
        pytest.skip(f"this machine has a driver and {found} GPU(s), so nothing is missing; make test-gpu uses them")


def used_of_cupy() -> set[str]:
    """The dotted names that the package's code takes from CuPy, such as ``cuda.Stream``."""
    names = set()
    for path in (ROOT / "dsml_gpu").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                root, _, name = ast.unparse(node).partition(".")
                if root in CUPY and name.replace(".", "").isidentifier():
                    names.add(name)
    return names


def test_cupy_has_all_that_the_package_uses(programs: Path, tmp_path: Path):
    used = used_of_cupy()
    assert "cuda.runtime.getDeviceCount" in used, "the code was read"
    missing = run([programs / "python", "-W", "error", "-c", MISSING, *sorted(used.union(OF_OBJECTS))], cwd=tmp_path)
    assert missing.split() == []


@pytest.mark.usefixtures("no_gpu")
def test_auto_takes_numpy_and_says_why(programs: Path, tmp_path: Path):
    command = [str(programs / "dsml-gpu"), "device", "--backend", "auto", "--port", "0", "--until-stdin-closes"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=clean_variables(),
        encoding="utf-8",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
        finally:
            rest, errors = process.communicate(timeout=20)
    assert "listening on" in ready, errors
    assert "numpy, because CuPy 1" in ready
    assert "finds no usable CUDA driver" in ready or "finds no GPU" in ready
    assert (rest, errors, process.returncode) == ("", "", 0)


@pytest.mark.usefixtures("no_gpu")
def test_cupy_as_asked_says_what_is_missing(programs: Path, tmp_path: Path):
    done = subprocess.run(
        [programs / "dsml-gpu", "device", "--backend", "cupy", "--port", "0"],
        cwd=tmp_path,
        env=clean_variables(),
        encoding="utf-8",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "finds no usable CUDA driver" in line or "finds no GPU" in line
