"""The comparison with other libraries, without them: a stand-in for torch takes a rank by itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import compare_peers, peer_worker, peers
from benchmarks.compare_peers import Row
from dsml_gpu.cli.measure import inputs
from dsml_gpu.client import local

ROOT = Path(__file__).parents[2]


def run(*options: str, python_path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/compare_peers.py", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(python_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


# ---- options ---------------------------------------------------------------------------------------------------------


def test_all_systems_and_sizes_by_default() -> None:
    options = compare_peers.parsed([])
    assert options.systems == ["dsml-p2p", "dsml-grpc", "gloo", "openmpi"]
    assert options.ranks == [2, 4]
    assert options.sizes == [8, 8_000, 80_000, 512_000, 3_600_000, 16_000_000, 64_000_000, 256_000_000]


def test_what_is_over_a_whole_number_of_elements_is_not_used() -> None:
    assert compare_peers.parsed(["--sizes", "9,1KiB"]).sizes == [8, 1024]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--systems", "gloo,nccl"], "unknown system 'nccl'; known: dsml-p2p, dsml-grpc, gloo, openmpi"),
        (["--sizes", "7"], "invalid sizes value: '7'"),
        (["--sizes", "many"], "invalid sizes value: 'many'"),
        (["--ranks", "2,0"], "invalid numbers value: '2,0'"),
        (["--repeat", "0"], "--repeat needs at least 1"),
    ],
)
def test_options_that_do_not_do(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare_peers.parsed(arguments)
    assert said in capsys.readouterr().err


# ---- figures ---------------------------------------------------------------------------------------------------------


class Replay:
    """A system whose times are known; each turn takes the next."""

    def __init__(self, *turns_s: list[float]) -> None:
        self._turns_s = iter(turns_s)

    def prepare(self, nbytes: int) -> int:
        return 0

    def run(self, times: int) -> list[float]:
        turn_s = next(self._turns_s)
        assert len(turn_s) == times
        return turn_s


def test_the_first_of_a_turn_does_not_count_in_the_median() -> None:
    systems = {"a": Replay([9.0, 1.0, 2.0], [9.0, 4.0, 3.0]), "b": Replay([0.0, 1e-6, 1e-6], [0.0, 1e-6, 1e-6])}
    assert compare_peers.medians_us(systems, rounds=2, burst=2) == {"a": 2.5e6, "b": 1.0}


def test_the_slowest_rank_counts_for_each_operation() -> None:
    assert peers.slowest([[1.0, 5.0], [2.0, 3.0]]) == [2.0, 5.0]


def test_ratios_are_to_p2p_or_else_to_grpc() -> None:
    medians = {"dsml-p2p": 2.0, "dsml-grpc": 8.0, "gloo": 1.0}
    assert compare_peers.ratios(medians) == {"dsml-grpc": 4.0, "gloo": 0.5}
    del medians["dsml-p2p"]
    assert compare_peers.ratios(medians) == {"gloo": 0.125}
    del medians["dsml-grpc"]
    assert compare_peers.ratios(medians) == {}


def test_a_line_of_the_table_has_times_and_ratios() -> None:
    names = ["dsml-grpc", "gloo", "openmpi"]
    assert compare_peers.heading(names).split()[2:] == [*names, "gloo/dsml-grpc", "openmpi/dsml-grpc"]
    assert compare_peers.line(8, dict(zip(names, [1000.0, 250.0, 1.5], strict=True)), names).split() == [
        *("8", "1000.0", "250.0", "1.5", "0.25", "0.0015")
    ]


def test_ours_in_empty_rpcs() -> None:
    (note,) = compare_peers.in_empty_rpcs({"dsml-grpc": 900.0, "gloo": 1.0}, 8, 300.0)
    assert note == "8 B: dsml-grpc takes 3.0 empty RPCs, of 300 us each"


def test_json_has_an_object_for_each_row() -> None:
    (row,) = json.loads(compare_peers.as_json([Row("gloo", 2, 8, 1.5)]))
    assert row == {"system": "gloo", "ranks": 2, "bytes": 8, "median_us": 1.5}


# ---- peers -----------------------------------------------------------------------------------------------------------


def test_absent_peers_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    with pytest.raises(peers.LeftOut, match="there is no torch; pip install"):
        peers.Peer("gloo", 2)
    with pytest.raises(peers.LeftOut, match="there is no mpi4py; pip install"):
        peers.Peer("openmpi", 2)
    monkeypatch.setattr(peers, "find_spec", lambda module: object())
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert "there is no mpirun" in (peers.absence("openmpi") or "")


def test_a_worker_counts_what_is_wrong_and_answers_every_time() -> None:
    def library(rank: int, extra: float) -> peer_worker.Library:
        """Two ranks, of which the other one is reckoned."""

        def all_reduce(buffer: np.ndarray) -> None:
            others = inputs(2, len(buffer), np.dtype(np.int8), "sum")[1 - rank]
            buffer += others
            buffer[0] += extra

        return peer_worker.Library(rank, 2, lambda: None, lambda buffer: lambda: all_reduce(buffer), lambda: None)

    right = list(peer_worker.answers(library(1, 0.0), ["prepare 80\n", "run 3\n", "prepare 8\n"]))
    assert (right[0], right[2]) == ("0", "0")
    assert [float(time_s) > 0 for time_s in right[1].split()] == [True] * 3
    assert list(peer_worker.answers(library(0, 1.0), ["prepare 80\n"])) == ["1"]


TORCH = """
def from_numpy(array):
    return array
"""
DISTRIBUTED = """
def init_process_group(backend, init_method, rank, world_size):
    assert (backend, rank, world_size) == ("gloo", 0, 1)
def all_reduce(buffer): {all_reduce}
def barrier(): pass
def destroy_process_group(): pass
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A folder with a torch whose only rank has the sum already."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(TORCH)
    (tmp_path / "torch" / "distributed.py").write_text(DISTRIBUTED.format(all_reduce="pass"))
    return tmp_path


def run_stand_in(stand_in: Path) -> subprocess.CompletedProcess[str]:
    options = ("--systems", "gloo", "--ranks", "1", "--sizes", "8,80", "--repeat", "2", "--json", str(stand_in / "rows"))
    return run(*options, python_path=Path(f"{stand_in}{os.pathsep}{ROOT}"))


def test_a_peer_is_measured(stand_in: Path) -> None:
    done = run_stand_in(stand_in)
    assert done.returncode == 0, done.stderr
    rows = json.loads((stand_in / "rows").read_text())
    assert [(row["system"], row["ranks"], row["bytes"]) for row in rows] == [("gloo", 1, 8), ("gloo", 1, 80)]
    assert all(row["median_us"] > 0 for row in rows)


def test_a_wrong_result_fails(stand_in: Path) -> None:
    (stand_in / "torch" / "distributed.py").write_text(DISTRIBUTED.format(all_reduce="buffer[0] += 1"))
    done = run_stand_in(stand_in)
    assert done.returncode == 1
    assert "FAILED: gloo on 1 ranks, 80 bytes: 1 elements are wrong" in done.stdout


def test_a_peer_that_does_not_start_or_dies_ends_the_run(stand_in: Path) -> None:
    (stand_in / "torch" / "distributed.py").write_text(DISTRIBUTED.format(all_reduce="raise SystemExit(3)"))
    died = run_stand_in(stand_in)
    (stand_in / "torch" / "__init__.py").write_text("raise ImportError('broken')")
    did_not_start = run_stand_in(stand_in)
    assert died.returncode == did_not_start.returncode == 1
    assert "PeerFailed: gloo: a rank's process ended" in died.stderr
    assert "ImportError: broken" in did_not_start.stderr


# ---- ours ------------------------------------------------------------------------------------------------------------


def test_both_transports_side_by_side_on_the_same_devices() -> None:
    with (
        local(2) as client,
        compare_peers.Ours(client, "dsml-p2p", 2) as p2p,
        compare_peers.Ours(client, "dsml-grpc", 2) as over_grpc,
    ):
        systems = {"dsml-p2p": p2p, "dsml-grpc": over_grpc}
        assert [system.prepare(nbytes) for nbytes in (80, 8) for system in systems.values()] == [0] * 4
        assert all(median_us > 0 for median_us in compare_peers.medians_us(systems, rounds=1, burst=2).values())


def test_p2p_that_is_not_used_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compare_peers.TRANSPORTS, "dsml-p2p", "grpc")
    with local(2) as client:
        for _ in range(2):  # the devices are given back
            with pytest.raises(peers.LeftOut, match="p2p was not used, but grpc"):
                compare_peers.Ours(client, "dsml-p2p", 2)
        assert client.communicator(2).nranks == 2


def test_ours_over_grpc(tmp_path: Path) -> None:
    options = ("--systems", "dsml-grpc", "--ranks", "2", "--sizes", "80", "--repeat", "1")
    done = run(*options, "--json", str(tmp_path / "rows"), "--plot", str(tmp_path / "plot.png"))
    assert done.returncode == 0, done.stderr
    assert "80 B: dsml-grpc takes " in done.stdout
    (row,) = json.loads((tmp_path / "rows").read_text())
    assert (row["system"], row["ranks"], row["bytes"]) == ("dsml-grpc", 2, 80)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")
