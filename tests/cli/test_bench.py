"""`dsml-gpu bench`: what it computes, what it prints and writes, what it refuses, and that it finds wrong elements."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from dsml_gpu.cli import bench
from dsml_gpu.cli.bench import Row, Setup
from dsml_gpu.cli.fleet import ServerProcess
from dsml_gpu.cli.main import app
from dsml_gpu.client import CollectiveResult

#: Times in microseconds whose median is 1000; the quartiles of five values are the second and the fourth.
TIMES_US = (1500.0, 700.0, 1000.0, 900.0, 1100.0)
ROW = Row(
    size_bytes=8_000_000,
    count=1_000_000,
    dtype="float64",
    op="sum",
    algorithm="ring",
    transports=("grpc",),
    nranks=4,
    times_us=TIMES_US,
    wrong=0,
)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


# ---- rows ---------------------------------------------------------------------------------------------------------------


def test_a_row_has_the_median_and_bandwidths_of_its_times() -> None:
    assert ROW.time_us == 1000.0
    assert ROW.algbw_gb_s == pytest.approx(8.0)  # 8e6 bytes in 1e-3 s
    assert ROW.busbw_gb_s == pytest.approx(12.0)  # times 2(4-1)/4
    assert ROW.quartiles_us() == (900.0, 1100.0)


def test_the_quartiles_of_one_run_are_its_time() -> None:
    assert replace(ROW, times_us=(5.0,)).quartiles_us() == (5.0, 5.0)


def test_a_line_has_a_cell_under_each_heading() -> None:
    headings, units = bench.heading(Setup(sizes=(8,))).splitlines()[-2:]
    line = bench.line(ROW)

    assert line.split() == ["8000000", "1000000", "float64", "sum", "ring", "grpc", "1000.0", "8", "12", "0"]
    for heading, cell in zip(
        ("#wrong", "busbw", "algbw", "time", "count"), ("0", "12", "8", "1000.0", "1000000"), strict=True
    ):
        assert line.rindex(f" {cell}") + len(f" {cell}") == headings.index(heading) + len(heading)
        line = line[: line.rindex(f" {cell}")]
    assert units.split() == ["#", "(B)", "(elements)", "(us)", "(GB/s)", "(GB/s)"]


def test_a_line_where_nothing_moved() -> None:
    assert bench.line(replace(ROW, transports=(), nranks=1)).split()[5] == "-"


def test_the_footing_adds_up() -> None:
    slower = replace(ROW, times_us=(2000.0,), wrong=3)  # half the bandwidth: (12 + 6) / 2
    assert bench.footing([ROW, slower]) == "# wrong elements: 3 FAILED\n# average busbw: 9 GB/s"
    assert bench.footing([ROW]) == "# wrong elements: 0 OK\n# average busbw: 12 GB/s"


def test_json_has_the_documented_keys() -> None:
    (found,) = json.loads(bench.as_json([ROW]))

    assert found.pop("algbw_gb_s") == pytest.approx(8.0)
    assert found.pop("busbw_gb_s") == pytest.approx(12.0)
    assert found == {
        "size_bytes": 8_000_000,
        "count": 1_000_000,
        "dtype": "float64",
        "op": "sum",
        "algorithm": "ring",
        "transports": ["grpc"],
        "nranks": 4,
        "iterations": 5,
        "time_us": 1000.0,
        "time_us_quartile1": 900.0,
        "time_us_quartile3": 1100.0,
        "wrong": 0,
    }


# ---- checking -----------------------------------------------------------------------------------------------------------


class HostArray:
    """As much of a `DeviceArray` as a measurement uses, in host memory."""

    def __init__(self, count: int, dtype: np.dtype[Any]) -> None:
        self.values = np.empty(count, dtype)
        self.nbytes = self.values.nbytes

    def set(self, source: np.ndarray) -> None:
        self.values[...] = source

    def get(self) -> np.ndarray:
        return self.values.copy()

    def free(self) -> None:
        pass


class HostCommunicator:
    """Sums in host memory; the algorithms of `faulty` leave so many last elements of the last rank as they were."""

    nranks = 3

    def __init__(self, faulty: dict[str, int]) -> None:
        self.faulty = faulty
        self.ran: list[str] = []

    def empty(self, count: int, dtype: np.dtype[Any]) -> list[HostArray]:
        return [HostArray(count, dtype) for _ in range(self.nranks)]

    def all_reduce(self, arrays: list[HostArray], *, op: str, algorithm: str) -> CollectiveResult:
        self.ran.append(algorithm)
        assert op == "sum"
        total = np.sum([array.values for array in arrays], axis=0)
        for array in arrays:
            kept = self.faulty.get(algorithm, 0) if array is arrays[-1] else 0
            array.values[: len(total) - kept] = total[: len(total) - kept]
        return CollectiveResult(algorithm, ("p2p",), 0.0, 0)


def measured(comm: HostCommunicator, **setup: Any) -> list[Row]:
    setup = {"sizes": (803,), "iterations": 2, "warmup": 1, **setup}
    return bench.measure_size(comm, Setup(**setup), 803)  # type: ignore[arg-type]


def test_wrong_elements_of_any_rank_are_counted_by_algorithm() -> None:
    # The inputs' last elements are such that no sum of three equals what the last rank brought.
    ring, naive = measured(HostCommunicator({"naive": 2}))
    assert (ring.algorithm, ring.wrong) == ("ring", 0)
    assert (naive.algorithm, naive.wrong) == ("naive", 2)


def test_only_whole_elements_are_measured() -> None:
    (row,) = measured(HostCommunicator({}), algorithms=("ring",))
    assert (row.count, row.size_bytes) == (100, 800)  # of 803 bytes


def test_algorithms_take_turns() -> None:
    comm = HostCommunicator({})
    measured(comm)
    assert comm.ran == ["ring", "naive"] * 4  # the check, 1 to warm up, 2 that count


@pytest.mark.parametrize(("wrong", "status"), [(0, 0), (1, 1)])
def test_the_exit_status_tells_of_wrong_elements(monkeypatch: pytest.MonkeyPatch, wrong: int, status: int) -> None:
    def measure(setup: Setup) -> Iterator[Row]:
        yield replace(ROW, wrong=wrong)

    monkeypatch.setattr(bench, "measure", measure)

    result = run()

    assert result.exit_code == status
    assert bench.line(replace(ROW, wrong=wrong)) in result.stdout


# ---- the command --------------------------------------------------------------------------------------------------------


def test_embedded_devices(tmp_path: Path) -> None:
    rows_file, plot_file = tmp_path / "rows.json", tmp_path / "plot.png"

    result = run(
        *("--embedded", "--devices", "2", "--sizes", "8,16KB", "--dtype", "int32", "--op", "max", "--iterations", "2"),
        *("--json", str(rows_file), "--plot", str(plot_file)),
    )

    assert result.exit_code == 0, result.output
    table = [line.split() for line in result.stdout.splitlines() if not line.startswith("#")]
    assert [(cells[0], cells[1], cells[4], cells[-1]) for cells in table] == [
        ("8", "2", "ring", "0"),
        ("8", "2", "naive", "0"),
        ("16000", "4000", "ring", "0"),
        ("16000", "4000", "naive", "0"),
    ]
    rows = json.loads(rows_file.read_text())
    assert {(row["dtype"], row["op"], row["nranks"], row["iterations"], *row["transports"]) for row in rows} == {
        ("int32", "max", 2, 2, "p2p")
    }
    assert plot_file.read_bytes().startswith(b"\x89PNG\r\n")


def test_a_running_coordinator_gets_its_devices_back() -> None:
    # It has two devices, so a second run needs those of the first.
    with ServerProcess("coordinator", "--embedded", "2") as server:
        options = ("--target", server.address, "--devices", "2", "--sizes", "64", "--iterations", "1", "--transport", "grpc")
        for _ in range(2):
            result = run(*options)
            assert result.exit_code == 0, result.output
            assert " grpc " in result.stdout


def test_device_servers_of_its_own() -> None:
    result = run("--devices", "2", "--sizes", "80KB", "--iterations", "1", "--algorithms", "naive")
    assert result.exit_code == 0, result.output
    (row,) = [line.split() for line in result.stdout.splitlines() if not line.startswith("#")]
    assert (row[4], row[5], row[-1]) == ("naive", "grpc", "0")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sizes", "many"], "'many' is not a size"),
        (["--sizes", "8KB,"], "'' is not a size"),
        (["--sizes", "4"], "4 bytes hold no float64, which takes 8"),
        (["--algorithms", "ring,tree"], "unknown algorithm 'tree' of all_reduce; known: ring, "),
        (["--dtype", "float128"], "unknown data type 'float128'"),
        (["--op", "mean"], "unknown op 'mean'"),
        (["--transport", "carrier-pigeon"], "unknown transport 'carrier-pigeon'"),
        (["--target", "127.0.0.1:1", "--embedded"], "exclude each other"),
        (["--json", "/no-such-folder/rows.json"], "/no-such-folder/rows.json: there is no such folder"),
        (["--embedded", "--devices", "2", "--transport", "p2p", "--sizes", "1TiB"], "memory"),
    ],
)
def test_what_cannot_be_measured_gets_one_line(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("dsml-gpu: ")
    assert said in line


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))

    result = run("--plot", "plot.png")

    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "dsml-gpu: --plot needs matplotlib; pip install 'dsml_gpu[bench]'\n"
