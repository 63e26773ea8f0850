"""`dsml-gpu tune` and `dsml-gpu explain`, on running servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dsml_gpu.cli import tune
from dsml_gpu.cli.fleet import ServerProcess
from dsml_gpu.cli.main import app
from dsml_gpu.client import connect
from dsml_gpu.schedules import algorithms_of
from dsml_gpu.schedules.cost_model import DEFAULT_COST_MODEL, LINKS_ONLY, CostModel
from tests.support.processes import run_to_end


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tune") / "coordinator.json"


@pytest.fixture(scope="module")
def coordinator(model_file: Path) -> Iterator[ServerProcess]:
    """Three embedded devices."""
    with ServerProcess("coordinator", "--embedded", "3", "--cost-model", str(model_file)) as server:
        yield server


def test_a_fleet_is_measured_and_chooses_by_it(coordinator: ServerProcess, model_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.json"
    result = run("tune", "--target", coordinator.address, "--max-size", "64KiB", "-o", str(output))
    assert result.exit_code == 0, result.output
    for words in ("p2p", "grpc", "recursive_doubling", "32 KiB", "half of the predictions are within"):
        assert words in result.output
    found = CostModel.from_json(output.read_text())
    # Both transports were measured, and neither is what it was before.
    assert found.p2p != DEFAULT_COST_MODEL.p2p
    assert found.grpc != DEFAULT_COST_MODEL.grpc
    with connect(coordinator.address) as client:
        assert client.cost_model() == found
    assert CostModel.from_json(model_file.read_text()) == found, "the coordinator keeps it"


def test_without_keep_the_coordinator_is_left_alone(coordinator: ServerProcess) -> None:
    with connect(coordinator.address) as client:
        client.set_cost_model(LINKS_ONLY)
        result = run("tune", "--target", coordinator.address, "--max-size", "4KiB", "--ranks", "2", "--no-keep")
        assert result.exit_code == 0, result.output
        assert client.cost_model() == LINKS_ONLY


def test_a_model_outlives_its_coordinator(tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    with ServerProcess("coordinator", "--cost-model", str(file)) as server, connect(server.address) as client:
        assert client.cost_model() == DEFAULT_COST_MODEL
        client.set_cost_model(LINKS_ONLY)
    with ServerProcess("coordinator", "--cost-model", str(file)) as server, connect(server.address) as client:
        assert client.cost_model() == LINKS_ONLY
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"], "nothing is left beside it"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tune", "--target", "127.0.0.1:1"], "127.0.0.1:1"),
        (["tune", "--output", "/nowhere/model.json"], "/nowhere/model.json: there is no such folder"),
        (["explain", "--collective", "all_produce"], "unknown collective 'all_produce'; known: all_reduce, reduce"),
        (["explain", "--ranks", "4", "--root", "4"], "root 4 is not one of 4 ranks"),
    ],
)
def test_refusals(arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody answers on port 1; the answer to that is not what is tested.
    monkeypatch.setattr(tune, "connect", lambda target: connect(target, timeout_s=0.5))
    result = run(*arguments)
    assert result.exit_code == 1
    assert words in result.output


def test_one_device_cannot_be_tuned() -> None:
    with ServerProcess("coordinator", "--embedded", "1") as server:
        result = run("tune", "--target", server.address)
    assert result.exit_code == 1
    assert "at least 2 devices" in result.output


def test_a_broken_model_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    file.write_text("[]")
    # A process of its own: a server's command sets up the process that it is called in.
    ended = run_to_end("coordinator", "--port", "0", "--cost-model", str(file))
    assert ended.returncode == 1
    assert "a cost model must be a JSON object" in ended.stderr


@pytest.mark.parametrize(
    ("devices", "expected"), [((8, 0), [2, 4, 8]), ((6, 0), [2, 4, 6]), ((8, 3), [2, 3]), ((2, 0), [2]), ((1, 0), [])]
)
def test_numbers_of_ranks(devices: tuple[int, int], expected: list[int]) -> None:
    assert tune.communicator_sizes(*devices) == expected


def test_explain_lists_the_candidates_by_time() -> None:
    result = run("explain", "--size", "4MiB", "--ranks", "8")
    assert result.exit_code == 0, result.output
    rows = [line.split("│")[1:-1] for line in result.output.splitlines() if line.startswith("│")]
    assert {row[0].strip() for row in rows} == set(algorithms_of("all_reduce"))
    parts = [float(row[2]) for row in rows]
    assert parts == sorted(parts)
    assert parts[0] == 1
    (ring,) = [[cell.strip() for cell in row] for row in rows if row[0].strip() == "ring"]
    # 2(N-1) steps and chunks; 2(N-1)/N of 4 MiB.
    assert ring[3:] == ["14", "14", "7 MiB", "Patarasuk and Yuan, 2009"]


@pytest.mark.parametrize("collective", ["broadcast", "all_gather", "all_to_all", "barrier"])
def test_explain_knows_all_collectives(collective: str) -> None:
    result = run("explain", "--collective", collective, "--ranks", "5")
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in algorithms_of(collective))


def test_explain_says_what_a_coordinator_chooses(coordinator: ServerProcess) -> None:
    result = run("explain", "--size", "64KiB", "--ranks", "3", "--target", coordinator.address)
    assert result.exit_code == 0, result.output
    with connect(coordinator.address) as client, client.communicator(3) as comm:
        done = comm.all_reduce(comm.empty((64 << 10) // 8))
        assert done is not None
        assert done.algorithm == "direct"
        assert "one pass over the memory" in " ".join(result.output.split())
        assert done.reason.split(", ")[0] == "predicted " + result.output.split("predicted ")[-1].strip().rstrip(".")
    refused = run("explain", "--ranks", "4", "--target", coordinator.address)
    assert refused.exit_code == 1
    assert "has 3" in refused.output
