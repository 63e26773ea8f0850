"""``import dsml_gpu`` and ``dsml-gpu --help`` cost little.

Each is the best of five runs: a start does the same work every time, and everything else on the machine can only add to
it, so the least is the nearest to what the code itself costs. A mean or a median would fail on a busy machine.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone

RUNS = 5


def best_s(command: Sequence[str | Path], cwd: Path) -> float:
    """Wall time of a whole process, the start of Python included."""
    times = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        subprocess.run(list(map(str, command)), cwd=cwd, check=True, stdout=subprocess.DEVNULL, timeout=30)
        times.append(time.perf_counter() - begin)
    return min(times)


def test_import_brings_no_heavy_module_in(tmp_path):
    heavy = ["cupy", "google.protobuf", "grpc", "ml_dtypes", "numpy", "prometheus_client", "rich", "typer"]
    code = f"import dsml_gpu, sys; print(*(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=30)
    assert done.stdout.split() == []


def test_import_takes_at_most_300_ms(tmp_path):
    assert best_s([sys.executable, "-c", "import dsml_gpu"], tmp_path) <= 0.3


def test_help_takes_at_most_600_ms(tmp_path):
    program = Path(sysconfig.get_path("scripts"), "dsml-gpu")
    assert program.exists(), "the package must be installed: make venv, or pip install -e ."
    assert best_s([program, "--help"], tmp_path) <= 0.6
