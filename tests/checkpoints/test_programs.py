"""Killed writers and flipped bits: a few in every run, and as many as are promised among the slow tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SEED = 1


def result_of(program: str, n: int, timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", f"tests.checkpoints.{program}", "--n", str(n), "--seed", str(SEED)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


COUNTS = [
    pytest.param(25, 100, id="25"),
    pytest.param(1000, 1100, id="1000", marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
]


@pytest.mark.parametrize(("n", "timeout_s"), COUNTS)
def test_writers_killed_at_random_instants(n: int, timeout_s: float):
    result = result_of("kill_writes", n, timeout_s)
    assert result["restored"] == n
    # It did hit them while they wrote.
    assert result["killed"].get("in the files", 0) >= n / 10
    if n >= 1000:
        assert result["killed"].get("in the manifest", 0) >= n / 100


@pytest.mark.parametrize(("n", "timeout_s"), COUNTS)
def test_flipped_bits(n: int, timeout_s: float):
    result = result_of("flipped_bits", n, timeout_s)
    assert result["refused"] == n
    assert result["in"].keys() == {"arrays", "header", "manifest"}
