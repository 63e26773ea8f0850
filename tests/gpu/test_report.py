"""The benchmark of the kernels and its report, as far as they can be run without a GPU: all but the figures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import dsml_gpu
from benchmarks import gpu_all_reduce, gpu_report, test_kernels
from dsml_gpu.memory.backend import BackendUnavailable, select_backends
from tests.gpu.conftest import simulated_gpus
from tests.gpu.test_gpu_servers import coordinator_over
from tests.support import simulated_server
from tests.support.simulated_cuda import Launcher

ROOT = Path(__file__).parents[2]
JUNIT = """<testsuites><testsuite time="12.5">
<testcase classname="a" name="one"/>
<testcase classname="a" name="two"><failure/></testcase>
<testcase classname="a" name="three"><skipped/></testcase>
</testsuite></testsuites>"""


class Recorder:
    """What `test_kernels` asks of the fixture of pytest-benchmark."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, run: Callable[[], None], rounds: int, warmup_rounds: int) -> None:
        for _ in range(rounds + warmup_rounds):
            run()


def test_the_table_has_every_row(launcher: Launcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(test_kernels, "BUFFER_BYTES", 1 << 12)
    monkeypatch.setattr(test_kernels, "ROUNDS", 2)
    rows = []
    for _ in simulated_gpus(launcher, monkeypatch, 1):
        bench = test_kernels.Bench()
        for parameters in test_kernels.rows():
            recorder = Recorder()
            test_kernels.test_kernel(bench, recorder, *parameters.values)
            rows.append({"extra_info": recorder.extra_info})
        (tmp_path / "kernels.json").write_text(json.dumps({"benchmarks": rows}))
        (tmp_path / "tests.xml").write_text(JUNIT)
        gpu_report.write(tmp_path, tmp_path)
    (table,) = (path.read_text() for path in tmp_path.glob("*simulated-gpu.txt"))
    (report,) = (json.loads(path.read_text()) for path in tmp_path.glob("*simulated-gpu.json"))
    assert "tests: 2 ran in 12 s, 1 failed, 1 skipped\n  failed: a.two\n" in table
    assert len(report["kernels"]) == len(rows) == sum(table.count(f"\n{op:5}") for op in test_kernels.OPS)
    targets = {(row["op"], row["dtype"], row["sources"]): row["target"] for row in report["kernels"] if row["target"]}
    assert targets == {("SUM", "FLOAT32", 4): 0.90, ("SUM", "FLOAT16", 4): 0.85, ("SUM", "BFLOAT16", 4): 0.85}
    assert all(row["kernel_to_copy"] > 0 for row in report["kernels"])


def test_all_reduces_beside_the_kernel(
    launcher: Launcher, kernels_on_cpu: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = (sys.executable, simulated_server.__file__, str(kernels_on_cpu))

    @contextmanager
    def serving(devices_of_servers: Sequence[int], nbytes: int) -> Iterator[dsml_gpu.Client]:
        servers = [
            ("device", "--backend", "cupy", *["--gpu", "0"] * number, "--memory", "16MiB") for number in devices_of_servers
        ]
        with (
            coordinator_over(command, tmp_path, *servers) as (coordinator, _),
            dsml_gpu.connect(coordinator.address) as client,
        ):
            yield client

    monkeypatch.setattr(gpu_all_reduce, "serving", serving)
    monkeypatch.setattr(gpu_all_reduce, "ALLOWED", {"one process": 1e6, "processes": 0.0})
    for _ in simulated_gpus(launcher, monkeypatch, 1):
        rows, failures = gpu_all_reduce.measure(40_000, repeat=2)
    assert [row["what"] for row in rows] == ["kernel", "one process", "processes"]
    assert len(failures) == 1
    assert failures[0].startswith("processes: ")
    (tmp_path / "all_reduce.json").write_text(json.dumps(rows))
    assert gpu_report.all_reduces(tmp_path / "all_reduce.json") == rows


def test_without_a_gpu_the_report_says_what_is_missing() -> None:
    try:
        select_backends("cupy")
    except BackendUnavailable:
        pass
    else:
        pytest.skip("this machine has a GPU")
    command = ["benchmarks/gpu_report.sh"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("gpu_report: ")
    assert "cupy" in ended.stderr.lower()
    assert len(ended.stderr.splitlines()) == 1
