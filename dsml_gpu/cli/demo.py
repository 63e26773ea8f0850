"""`dsml-gpu demo`: data-parallel training over device servers, checked against the same training without them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from dsml_gpu.cli import digits
from dsml_gpu.cli.digits import Examples, Replica
from dsml_gpu.cli.fleet import Fleet, ServerDidNotStart
from dsml_gpu.cli.measure import time_interleaved
from dsml_gpu.cli.serve import fail
from dsml_gpu.client import Communicator, DeviceArray, connect
from dsml_gpu.errors import DsmlError
from dsml_gpu.schedules import UnknownAlgorithm, find_algorithm

#: Replicas add the shards' gradients in another order than one process does, so rounding differs; nothing else may.
TOLERANCE = 1e-9
#: Sizes at which ring and naive are compared, in float64 elements: the demo's gradient, and 3.6 MB.
COMPARED_SIZES = (digits.PARAMETERS, 450_000)
COMPARED_RUNS = 9
COMPARED = ("ring", "naive")


class DemoFailed(Exception):
    """The training over device servers is not what it must be."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What to train: passes over the digits, number of workers (and devices), and algorithm of the all-reduce."""

    epochs: int
    nworkers: int
    algorithm: str


class Worker:
    """One worker: its replica of the model, and its device's memory for gradients.

    Args:
        rank: which of the `nworkers` it is.
        gradient: array on its device, averaged over all workers between `compute` and `update`.
    """

    def __init__(self, rank: int, nworkers: int, gradient: DeviceArray) -> None:
        self.replica = digits.initial()
        self._rank = rank
        self._nworkers = nworkers
        self._gradient = gradient

    def compute(self, batch: Examples) -> None:
        """Leaves the gradient of its shard of the batch in its device's memory."""
        shard = digits.shard(batch, self._rank, self._nworkers)
        self._gradient.set(digits.gradient(self.replica.parameters, shard, len(batch) / self._nworkers))

    def update(self) -> None:
        """Takes the average from its device's memory and goes one step with it."""
        self.replica = self.replica.updated(self._gradient.get())


@dataclass(frozen=True, slots=True)
class Training:
    """What a training over device servers came to.

    Attributes:
        replica: the trained model, the same on all workers.
        steps: batches trained on.
        transports: that carried gradients; empty with one worker.
        device_bytes: payload that went from device to device.
        host_bytes: payload that went between workers and their devices, both ways.
        elapsed_s: of all steps together.
    """

    replica: Replica
    steps: int
    transports: tuple[str, ...]
    device_bytes: int
    host_bytes: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Check:
    """How a trained model does.

    Attributes:
        accuracy: share, from 0 to 1, of digits that it reads right ...
        digits: ... among this many that it was not trained on.
        difference: largest absolute difference of a parameter from training in one process, without servers.
    """

    accuracy: float
    digits: int
    difference: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Median time in seconds of each algorithm, by name, for buffers of `nbytes`."""

    nbytes: int
    median_s: dict[str, float]


def run(setup: Setup) -> None:
    """Trains and prints the results; whatever goes wrong becomes one line and exit status 1."""
    try:
        if setup.algorithm != "auto":
            find_algorithm("all_reduce", setup.algorithm)
    except UnknownAlgorithm as error:
        fail(str(error))
    try:
        examples = digits.load()
    except ImportError as error:
        fail(f"the demo trains on digits of scikit-learn ({error}); pip install 'dsml_gpu[demo]'")
    try:
        _run(setup, *examples)
    except (DemoFailed, DsmlError, ServerDidNotStart) as error:
        fail(str(error))


def _run(setup: Setup, train_on: Examples, test_on: Examples) -> None:
    console = Console(highlight=False)
    with Fleet(setup.nworkers) as fleet, connect(fleet.address) as client, client.communicator(setup.nworkers) as comm:
        with interrupts_at_steps() as raise_interrupt:
            console.print(f"{setup.nworkers} device servers run on this machine, and their coordinator at {fleet.address}")
            # Where nobody watches, a bar is only noise.
            with Progress(*_columns(), console=console, disable=not console.is_terminal) as progress:
                bar = progress.add_task("training", total=setup.epochs * digits.batches_per_epoch(train_on))

                def on_step() -> None:
                    progress.advance(bar)
                    raise_interrupt()

                training = train(comm, train_on, setup, on_step)
        comparisons = [compare(comm, elements) for elements in COMPARED_SIZES]
    check = check_training(training, train_on, test_on, setup.epochs)
    console.print(table(setup, training, check, comparisons))
    require_rounding_only(check.difference)


@contextmanager
def interrupts_at_steps() -> Iterator[Callable[[], None]]:
    """Makes Ctrl-C wait for the function that this gives, which raises KeyboardInterrupt then; a second one does so at once.

    Raised anywhere it can be lost: what is raised in a callback of gRPC's own code ends there.
    """
    interrupted = False

    def remember(number: int, frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, previous)

    def raise_interrupt() -> None:
        if interrupted:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield raise_interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


def train(comm: Communicator, examples: Examples, setup: Setup, on_step: Callable[[], object]) -> Training:
    """Trains one replica per rank; each step averages the gradients of all ranks with one all-reduce.

    Args:
        on_step: called after each step.

    Raises:
        DemoFailed: replicas are not the same bits after a step.
    """
    gradients = comm.empty(digits.PARAMETERS)
    workers = [Worker(rank, comm.nranks, gradient) for rank, gradient in enumerate(gradients)]
    steps = device_bytes = 0
    transports: tuple[str, ...] = ()
    started = time.perf_counter()
    for epoch in range(setup.epochs):
        for batch in digits.batches(examples, epoch):
            for worker in workers:
                worker.compute(batch)
            result = comm.all_reduce(gradients, op="avg", algorithm=setup.algorithm)
            assert result is not None  # it is None in a group only
            for worker in workers:
                worker.update()
            steps += 1
            device_bytes += result.bytes_sent
            transports = result.transports
            check_identical([worker.replica for worker in workers], steps)
            on_step()
    elapsed_s = time.perf_counter() - started
    host_bytes = 2 * steps * sum(gradient.nbytes for gradient in gradients)
    return Training(workers[0].replica, steps, transports, device_bytes, host_bytes, elapsed_s)


def check_identical(replicas: Sequence[Replica], step: int) -> None:
    """Raises DemoFailed unless all replicas have the same parameters."""
    for rank, replica in enumerate(replicas):
        if not np.array_equal(replica.parameters, replicas[0].parameters):
            raise DemoFailed(f"after step {step} the replica of worker {rank} is not that of worker 0")


def require_rounding_only(difference: float) -> None:
    """Raises DemoFailed where parameters differ by more than rounding from those trained in one process."""
    if not difference < TOLERANCE:  # NaN is no success
        raise DemoFailed(
            f"parameters differ by {difference:.3g} from those trained in one process; {TOLERANCE:g} is allowed"
        )


def check_training(training: Training, train_on: Examples, test_on: Examples, epochs: int) -> Check:
    """Tests the model, and compares it to the one that one process trains without servers."""
    parameters = training.replica.parameters
    alone = digits.train_alone(train_on, epochs)
    difference = float(np.abs(parameters - alone.parameters).max())
    return Check(digits.accuracy(parameters, test_on), len(test_on), difference)


def compare(comm: Communicator, elements: int) -> Comparison:
    """Times the algorithms in turn on buffers of `elements` float64."""
    arrays = comm.array([np.zeros(elements)] * comm.nranks)
    work = {name: partial(comm.all_reduce, arrays, algorithm=name) for name in COMPARED}
    times_s = time_interleaved(work, COMPARED_RUNS)
    return Comparison(arrays[0].nbytes, {name: median(runs_s) for name, runs_s in times_s.items()})


def table(setup: Setup, training: Training, check: Check, comparisons: Sequence[Comparison]) -> Table:
    """All results, for people."""
    over = f" over {', '.join(training.transports)}" if training.transports else ""
    title = f"Data-parallel training, {setup.nworkers} workers, {setup.algorithm} all-reduce{over}"
    result = Table(title=title, title_justify="left", show_header=False)
    result.add_row("accuracy", f"{check.accuracy:.1%} of {check.digits} digits that it has not seen")
    result.add_row("epochs", str(setup.epochs))
    result.add_row("steps", f"{training.steps} in {training.elapsed_s:.1f} s")
    result.add_row("replicas", "the same bits on all workers after every step")
    result.add_row("against one process", f"parameters differ by {check.difference:.2g} at most")
    result.add_row("sent by devices", decimal_size(training.device_bytes))
    result.add_row("workers to devices and back", decimal_size(training.host_bytes))
    for comparison in comparisons:
        times = ", ".join(f"{name} {time_s * 1e3:.1f} ms" for name, time_s in comparison.median_s.items())
        result.add_row(f"all-reduce of {decimal_size(comparison.nbytes)}", f"{times} (medians of {COMPARED_RUNS})")
    return result


def decimal_size(nbytes: int) -> str:
    """``"38.5 kB"``, ``"3.6 MB"``: decimal, as bandwidths are."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"


def _columns() -> tuple[ProgressColumn, ...]:
    return TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn()
