"""`dsml-gpu simulate`: what it computes, prints, writes and refuses, and that large clusters take it seconds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dsml_gpu.cli import simulate
from dsml_gpu.cli.main import app
from dsml_gpu.cli.simulate import Row, Setup, algorithm_of, fastest, in_words, parse_list
from dsml_gpu.cli.simulate_plot import crossovers
from dsml_gpu.cli.units import parse_size
from dsml_gpu.schedules import find_algorithm
from dsml_gpu.schedules.cost_model import DEFAULT_COST_MODEL, LINKS_ONLY
from dsml_gpu.schedules.topology import Cluster, Link

MIB = 1 << 20
POD = Path(__file__).parents[2] / "benchmarks" / "topologies" / "gpu_pod.toml"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["simulate", *arguments])


def row(nranks: int, size_bytes: int, **times_s: float) -> Row:
    return Row(nranks, size_bytes, times_s, dict.fromkeys(times_s, "events"))


# ---- options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("8", (8,)),
        ("8..65536", tuple(8 << power for power in range(14))),
        ("2,3,8..32", (2, 3, 8, 16, 32)),
        ("8..8", (8,)),
        ("3..13", (3, 6, 12)),
        ("4,4..8,8", (4, 8)),
    ],
)
def test_lists_and_ranges(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_list(text, int) == numbers


def test_ranges_of_sizes() -> None:
    assert parse_list("1MiB..16GiB", parse_size) == tuple(MIB << power for power in range(15))


@pytest.mark.parametrize(
    ("collective", "name"),
    [("all_reduce", "double_binary_tree"), ("broadcast", "binomial_tree"), ("gather", "binomial_tree")],
)
def test_tree_is_the_best_tree_that_there_is(collective: str, name: str) -> None:
    assert algorithm_of(collective, "tree") is find_algorithm(collective, name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--collective", "send_recv"], "unknown collective 'send_recv'; known: all_reduce, "),
        (["--algorithm", "ring,star"], "unknown algorithm 'star' of all_reduce; known: ring, "),
        (["--collective", "reduce_scatter", "--algorithm", "tree"], "unknown algorithm 'tree' of reduce_scatter"),
        (["--ranks", "many"], "'many' is not a number of ranks"),
        (["--ranks", "16..8"], "'16..8' is not a range such as 8..1024"),
        (["--ranks", "0..8"], "'0..8' is not a range such as 8..1024"),
        (["--ranks", "0"], "at least 1 rank is needed"),
        (["--size", "0"], "at least 1 byte is needed"),
        (["--size", "big"], "'big' is not a size"),
        (["--slice", "0"], "slices cannot have 0 bytes"),
        (
            ["--collective", "all_to_all", "--algorithm", "direct,pairwise", "--ranks", "8..128"],
            "all_to_all pairwise has no outline, so it can be simulated event by event only: on at most 64 ranks, not 128",
        ),
        (["--cost-model", "no-such-file"], "no-such-file: No such file or directory"),
        (["--json", "/no-such-folder/rows.json"], "/no-such-folder/rows.json: there is no such folder"),
        (["--plot", "/no-such-folder/plot.png"], "/no-such-folder/plot.png: there is no such folder"),
    ],
)
def test_what_cannot_be_predicted_gets_one_line(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("dsml-gpu: ")
    assert said in line


def test_files_that_are_not_what_they_should_be_are_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("[hosts]\ncount = 2\nranks = 4\n")
    assert run("--topology", str(file), "--ranks", "8").exit_code == 0
    for arguments, said in (
        (["--cost-model", str(file)], f"{file}: a cost model must be JSON: "),
        (["--topology", str(file), "--ranks", "4,9"], "9 ranks do not fit: 2 hosts with 4 devices each have 8"),
    ):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith(f"dsml-gpu: {said}")


def test_a_plot_without_matplotlib_is_refused_before_anything_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    result = run("--plot", "plot.png")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "dsml-gpu: --plot needs matplotlib; pip install 'dsml_gpu[bench]'\n"


# ---- what is fastest ----------------------------------------------------------------------------------------------------


def test_of_times_that_hardly_differ_the_first_counts() -> None:
    assert fastest({"a": 1.0005, "b": 1.0, "c": 2.0}) == "a"
    assert fastest({"a": 1.002, "b": 1.0, "c": 2.0}) == "b"


def test_crossovers_in_words() -> None:
    small, middle, large, larger = (row(4, size * MIB, a=1.0, b=2.0, c=3.0) for size in (1, 2, 4, 8))
    assert in_words([small]) == "a is fastest at this size"
    assert in_words([small, large]) == "a is fastest at all sizes"
    b, c = ({"a": 3.0, "b": 1.0, "c": 2.0}, {"a": 3.0, "b": 2.0, "c": 1.0})
    assert in_words([small, row(4, 2 * MIB, **b)]) == "a is fastest up to 1 MiB, b from 2 MiB on"
    assert in_words([small, row(4, 2 * MIB, **b), row(4, 4 * MIB, **c)]) == (
        "a is fastest up to 1 MiB, b at 2 MiB, c from 4 MiB on"
    )
    assert in_words([small, middle, row(4, 4 * MIB, **b), row(4, 8 * MIB, **b), row(4, 16 * MIB, **c)]) == (
        "a is fastest up to 2 MiB, b from 4 MiB to 8 MiB, c from 16 MiB on"
    )
    assert in_words([small, row(4, 2 * MIB, **b), large, larger]) == "a is fastest up to 1 MiB, b at 2 MiB, a from 4 MiB on"


def test_crossovers_are_where_lines_meet() -> None:
    """In log-log scale: b is 2 times as slow at 1 and 8 times as fast at 16, so they meet at a quarter of the way, at 2."""
    points = [(1, {"a": 1.0, "b": 2.0}), (16, {"a": 16.0, "b": 2.0}), (64, {"a": 16.0, "b": 2.0})]
    assert crossovers(points) == [pytest.approx((2.0, 2.0))]


def test_crossovers_leave_out_what_takes_no_time() -> None:
    assert crossovers([(1, {"a": 0.0, "b": 0.0}), (2, {"a": 1.0, "b": 2.0}), (4, {"a": 2.0, "b": 1.0})]) == [
        pytest.approx((2 * 2**0.5, 2**0.5))
    ]


# ---- predictions --------------------------------------------------------------------------------------------------------


def test_predictions_are_those_of_the_formula() -> None:
    """2(N-1)(latency + S/(N B)) by events, and by rounds, where chunks are single slices."""
    setup = Setup(
        (find_algorithm("all_reduce", "ring"),), (4, 4096), (MIB,), Cluster(device=Link(1e-5, 1e9)), max_messages=100
    )
    for predicted, nranks, method in zip(simulate.predict(setup), (4, 4096), ("events", "rounds"), strict=True):
        assert predicted.methods == {"ring": method}
        assert predicted.times_s["ring"] == pytest.approx(2 * (nranks - 1) * (1e-5 + MIB / nranks / 1e9))


@pytest.mark.parametrize("collective", ["all_gather", "reduce_scatter", "all_to_all"])
def test_a_size_is_that_of_the_larger_buffer(collective: str) -> None:
    """4 ranks: 3 of 4 parts of the buffer go through each device's link."""
    setup = Setup((find_algorithm(collective, "direct"),), (4,), (4 * MIB,), Cluster(device=Link(0.0, MIB)))
    (predicted,) = simulate.predict(setup)
    assert predicted.times_s["direct"] == pytest.approx(3.0)


def test_processors_cost_what_the_model_says(tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    file.write_text(DEFAULT_COST_MODEL.to_json())
    models = [simulate.parse_cost_model(text) for text in ("links", "default", str(file))]
    assert models == [LINKS_ONLY, DEFAULT_COST_MODEL, DEFAULT_COST_MODEL]


def test_the_table_and_the_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    result = run("--algorithm", "ring,tree", "--ranks", "2,256", "--size", "1KiB,1GiB", "--json", str(file))
    assert result.exit_code == 0, result.output
    head = [line for line in result.stdout.splitlines() if line.startswith("#")]
    table = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    assert head[0] == "# all_reduce, predicted time: 1 rank to a host, NIC 100 Gbit/s 5 us; processors cost nothing"
    assert head[3].split() == ["#", "ranks", "size", "ring", "double_binary_tree", "method"]
    assert head[-1] == "# 256 ranks: double_binary_tree is fastest up to 1 KiB, ring from 1 GiB on"
    assert [line.split()[:3] + line.split()[-1:] for line in table] == [
        ["2", "1", "KiB", "events"],
        ["2", "1", "GiB", "events"],
        ["256", "1", "KiB", "rounds"],
        ["256", "1", "GiB", "rounds"],
    ]
    assert all(line.count("*") == 1 for line in table)
    # Columns stand below their headings.
    assert {line.index(table[0].split()[-1]) for line in table[:2]} == {head[3].index("method")}
    rows = json.loads(file.read_text())
    assert [(one["nranks"], one["size_bytes"], one["algorithm"]) for one in rows[:3]] == [
        (2, 1024, "ring"),
        (2, 1024, "double_binary_tree"),
        (2, 1 << 30, "ring"),
    ]
    large = rows[-2]
    assert (large["collective"], large["method"], large["best"], rows[-1]["best"]) == ("all_reduce", "rounds", True, False)
    # 2(N-1)/N of the data at 12.5 GB/s, and the one latency that is not hidden.
    assert large["time_us"] == pytest.approx((2 * 255 * (1 << 30) / 256 / 12.5e9 + 5e-6) * 1e6)
    assert large["algbw_gb_s"] == pytest.approx((1 << 30) / large["time_us"] / 1e3)


@pytest.mark.parametrize(("ranks", "size"), [("1..16", "1KiB..1MiB"), ("4", "1KiB,1MiB"), ("2,4", "1MiB"), ("3", "1KiB")])
def test_the_picture(tmp_path: Path, ranks: str, size: str) -> None:
    file = tmp_path / "plot.png"
    result = run("--algorithm", "ring,tree,direct", "--ranks", ranks, "--size", size, "--plot", str(file))
    assert result.exit_code == 0, result.output
    assert file.read_bytes().startswith(b"\x89PNG\r\n")


def test_all_algorithms_by_default() -> None:
    result = run("--collective", "broadcast", "--ranks", "5", "--size", "1MiB", "--cost-model", "default")
    assert result.exit_code == 0, result.output
    heading = next(line for line in result.stdout.splitlines() if "method" in line and "size" in line)
    assert heading.split()[3:-1] == ["ring", "binomial_tree", "scatter_all_gather", "direct"]


@pytest.mark.alone
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="the system does not say what a process has used")
def test_65536_ranks_take_less_than_10_seconds_and_2_gigabytes() -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "dsml_gpu", "simulate", "--algorithm", "ring,tree,hierarchical"),
            *("--ranks", "8..65536", "--size", "1MiB..16GiB", "--topology", str(POD)),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    table = [line for line in process.stdout.read().splitlines() if not line.startswith("#")]
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    assert process.returncode == 0
    assert len(table) == 14 * 15
    assert used.ru_utime + used.ru_stime < 10
    resident_bytes = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert resident_bytes < 2e9
