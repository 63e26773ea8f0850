"""`dsml-gpu demo`: its model, its training over devices, and that the command leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

import dsml_gpu
from dsml_gpu.cli import demo, digits
from dsml_gpu.cli.demo import Comparison, DemoFailed, Setup
from dsml_gpu.cli.digits import Examples, Replica
from dsml_gpu.cli.main import app


@pytest.fixture(scope="module")
def examples() -> tuple[Examples, Examples]:
    return digits.load()


def random_parameters() -> np.ndarray:
    return 0.3 * np.random.default_rng(1).standard_normal(digits.PARAMETERS)


# ---- the model ----------------------------------------------------------------------------------------------------------


def test_the_digits_are_split_without_overlap(examples: tuple[Examples, Examples]) -> None:
    train_on, test_on = examples
    assert (len(train_on), len(test_on)) == (1797 - digits.HELD_OUT, digits.HELD_OUT)
    assert train_on.images.min() == 0.0
    assert train_on.images.max() == 1.0
    assert set(train_on.labels) == set(test_on.labels) == set(range(10))


@pytest.mark.parametrize("parameter", [0, 40 * digits.HIDDEN + 7, 64 * 64 + 5, 64 * 64 + 64 + 33, digits.PARAMETERS - 1])
def test_the_gradient_is_the_slope_of_the_loss(examples: tuple[Examples, Examples], parameter: int) -> None:
    some, parameters = examples[0][:50], random_parameters()
    direction = np.zeros(digits.PARAMETERS)
    direction[parameter] = 1e-5

    slope = (digits.loss(parameters + direction, some) - digits.loss(parameters - direction, some)) / 2e-5

    assert digits.gradient(parameters, some, len(some))[parameter] == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_an_epoch_has_every_example_once_in_an_order_of_its_own() -> None:
    examples = Examples(np.zeros((150, digits.PIXELS)), np.arange(150))

    first, again, second = ([batch.labels for batch in digits.batches(examples, epoch)] for epoch in (0, 0, 1))

    assert [len(labels) for labels in first] == [64, 64, 22]
    assert len(first) == digits.batches_per_epoch(examples)
    assert sorted(np.concatenate(first)) == list(range(150))
    assert np.array_equal(np.concatenate(first), np.concatenate(again))
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))


@pytest.mark.parametrize(("size", "workers"), [(64, 4), (29, 4), (64, 3), (2, 3)])
def test_workers_gradients_average_to_that_of_the_batch(
    examples: tuple[Examples, Examples], size: int, workers: int
) -> None:
    batch, parameters = examples[0][:size], random_parameters()
    shards = [digits.shard(batch, worker, workers) for worker in range(workers)]

    average = sum(digits.gradient(parameters, shard, size / workers) for shard in shards) / workers

    assert sorted(len(shard) for shard in shards)[-1] == -(-size // workers)
    assert sum(map(len, shards)) == size
    np.testing.assert_allclose(average, digits.gradient(parameters, batch, size), rtol=0, atol=1e-14)


def test_momentum_goes_on_in_the_direction_of_earlier_gradients() -> None:
    replica = Replica(np.array([1.0]), np.array([10.0])).updated(np.array([2.0]))
    assert replica.velocity == pytest.approx(0.9 * 10 + 2)
    assert replica.parameters == pytest.approx(1 - 0.2 * 11)


def test_the_model_learns_to_read(examples: tuple[Examples, Examples]) -> None:
    train_on, test_on = examples
    assert digits.accuracy(digits.initial().parameters, test_on) < 0.3
    assert digits.accuracy(digits.train_alone(train_on, 10).parameters, test_on) > 0.95


# ---- training over devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", demo.COMPARED)
def test_training_on_devices_is_training_alone(examples: tuple[Examples, Examples], algorithm: str) -> None:
    some, nworkers = examples[0][:150], 3
    steps = 2 * digits.batches_per_epoch(some)
    reported: list[None] = []

    with dsml_gpu.local(nworkers) as client, client.communicator(nworkers) as comm:
        training = demo.train(comm, some, Setup(2, nworkers, algorithm), lambda: reported.append(None))

    np.testing.assert_allclose(
        training.replica.parameters, digits.train_alone(some, 2).parameters, rtol=0, atol=demo.TOLERANCE
    )
    assert len(reported) == training.steps == steps
    nbytes = 8 * digits.PARAMETERS
    assert training.device_bytes == steps * 2 * (nworkers - 1) * nbytes  # ring and naive send the same in all
    assert training.host_bytes == steps * nworkers * 2 * nbytes
    assert training.transports == ("p2p",)


def test_replicas_that_differ_in_one_bit_are_found() -> None:
    replica = digits.initial()
    parameters = replica.parameters.copy()
    parameters[17] = np.nextafter(parameters[17], 1.0)

    demo.check_identical([replica, replica], step=1)
    with pytest.raises(DemoFailed, match="after step 9 the replica of worker 2 is not that of worker 0"):
        demo.check_identical([replica, replica, Replica(parameters, replica.velocity)], step=9)


@pytest.mark.parametrize("difference", [1e-9, 1.0, float("nan")])
def test_more_than_rounding_is_a_failure(difference: float) -> None:
    demo.require_rounding_only(1e-12)
    with pytest.raises(DemoFailed, match="differ by"):
        demo.require_rounding_only(difference)


def test_algorithms_are_compared_at_the_size_asked_for() -> None:
    with dsml_gpu.local(2) as client, client.communicator(2) as comm:
        comparison = demo.compare(comm, 1000)
    assert comparison.nbytes == 8000
    assert comparison.median_s.keys() == set(demo.COMPARED)
    assert min(comparison.median_s.values()) > 0


def test_the_table_has_all_results(examples: tuple[Examples, Examples]) -> None:
    training = demo.Training(digits.initial(), 46, ("grpc",), 1_500_000, 2_000, 3.25)
    check = demo.Check(0.975, 360, 3e-16)
    comparison = Comparison(3_600_000, {"ring": 0.05, "naive": 0.0625})

    table = demo.table(Setup(2, 4, "ring"), training, check, [comparison])

    names, values = ([str(cell) for cell in column.cells] for column in table.columns)
    found = dict(zip(names, values, strict=True))
    assert found["accuracy"].startswith("97.5% of 360")
    assert found["steps"] == "46 in 3.2 s"
    assert "3e-16" in found["against one process"]
    assert found["sent by devices"] == "1.5 MB"
    assert found["workers to devices and back"] == "2.0 kB"
    assert found["all-reduce of 3.6 MB"].startswith("ring 50.0 ms, naive 62.5 ms")


# ---- the command --------------------------------------------------------------------------------------------------------


def test_without_scikit_learn_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)  # importing it fails

    result = CliRunner().invoke(app, ["demo"])

    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.endswith("pip install 'dsml_gpu[demo]'")


def test_an_unknown_algorithm_gets_one_line() -> None:
    result = CliRunner().invoke(app, ["demo", "--algorithm", "tree"])
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 1
    assert line.startswith("dsml-gpu: unknown algorithm 'tree' of all_reduce; known: ring, ")


@contextmanager
def running_demo(workers: int, epochs: int) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """The command once its servers run, and the servers; in a process group of its own, as a shell would start it."""
    command = [sys.executable, "-m", "dsml_gpu", "demo", "--workers", str(workers), "--epochs", str(epochs)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            assert "device servers run" in process.stdout.readline()
            yield process, psutil.Process(process.pid).children()
        finally:
            process.kill()


def alive_after(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    _, alive = psutil.wait_procs(processes, timeout_s)
    return list(alive)


def test_one_epoch() -> None:
    with running_demo(workers=2, epochs=1) as (process, servers):
        stdout, stderr = process.communicate(timeout=60)

        assert (process.returncode, stderr) == (0, "")
        assert len(servers) == 3
        assert not alive_after(servers, 5)
    assert "digits that it has not seen" in stdout
    assert "\x1b" not in stdout, "escape sequences where no terminal is"
    assert "\r" not in stdout


def test_interrupting_it_ends_its_servers() -> None:
    with running_demo(workers=1, epochs=1000) as (process, servers):
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to everyone
        _, stderr = process.communicate(timeout=30)

        assert process.returncode == 130
        assert not alive_after(servers, 5)
    assert stderr == ""


def test_killing_it_ends_its_servers() -> None:
    with running_demo(workers=1, epochs=1000) as (process, servers):
        process.kill()
        assert not alive_after(servers, 20)


def test_a_dead_device_server_ends_it() -> None:
    with running_demo(workers=2, epochs=1000) as (process, servers):
        servers[0].kill()
        _, stderr = process.communicate(timeout=60)

        assert process.returncode == 1
        assert not alive_after(servers, 5)
    last = stderr.splitlines()[-1]  # the coordinator may have logged before
    assert last.startswith("dsml-gpu: ")
    # Whichever comes first: a call of this operation, or the heartbeats.
    assert "does not answer" in last or "is gone: its process has ended" in last
    assert "Traceback" not in stderr
