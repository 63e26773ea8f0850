"""Other libraries' all-reduce, in worker processes that do what they are told: gloo and Open MPI, for `compare_peers.py`."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

GLOO, OPENMPI = "gloo", "openmpi"
WORKER = Path(__file__).with_name("peer_worker.py")
#: A peer that takes longer to start or to answer hangs, and one that takes longer to end is ended.
ANSWER_TIMEOUT_S, END_TIMEOUT_S = 120.0, 15.0


class LeftOut(Exception):
    """A system cannot be measured here; says why."""


class PeerFailed(RuntimeError):
    """A peer's process ended or hangs; what it said went to our standard error."""


class Peer:
    """Another library, in a process for each rank (`peer_worker.py`), which end with the ``with`` block or with us.

    Raises:
        LeftOut: it is not installed.
        PeerFailed: it does not start; or, of all methods, it ended or hangs.
    """

    def __init__(self, name: str, nranks: int) -> None:
        reason = absence(name)
        if reason is not None:
            raise LeftOut(reason)
        self._name = name
        self._ranks: list[TextIO] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-"))
            stack.callback(self._end_processes)
            address = f"{folder}/driver"
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(address)
                listener.listen()
                for command in commands(name, nranks, folder, [sys.executable, str(WORKER), name, address]):
                    self._start(command)
                self._ranks = [stack.enter_context(self._accept(listener)) for _ in range(nranks)]
            self._answers()  # each says that it is ready
            self._open = stack.pop_all()

    def _start(self, command: Sequence[str]) -> None:
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        self._processes.append(
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                env={"GLOO_SOCKET_IFNAME": loopback} | os.environ,
                start_new_session=True,  # Ctrl-C is for the one who started it, who then ends it in order
            )
        )

    def _accept(self, listener: socket.socket) -> TextIO:
        """The next rank that comes."""
        listener.settimeout(0.2)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while time.monotonic() < deadline:
            if any(process.poll() is not None for process in self._processes):
                raise PeerFailed(f"{self._name} did not start")
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:  # the stream keeps it open
                connection.settimeout(ANSWER_TIMEOUT_S)
                return connection.makefile("rw", encoding="utf-8")
        raise PeerFailed(f"{self._name} did not start within {ANSWER_TIMEOUT_S:g} s")

    def prepare(self, nbytes: int) -> int:
        return sum(map(int, self._all_do(f"prepare {nbytes}")))

    def run(self, times: int) -> list[float]:
        return slowest([[float(time_s) for time_s in answer.split()] for answer in self._all_do(f"run {times}")])

    def _all_do(self, command: str) -> list[str]:
        for rank in self._ranks:
            rank.write(f"{command}\n")
            rank.flush()
        return self._answers()

    def _answers(self) -> list[str]:
        try:
            answers = [rank.readline() for rank in self._ranks]
        except TimeoutError:
            raise PeerFailed(f"{self._name} did not answer within {ANSWER_TIMEOUT_S:g} s") from None
        if not all(answers):
            raise PeerFailed(f"{self._name}: a rank's process ended")
        return answers

    def _end_processes(self) -> None:
        deadline = time.monotonic() + END_TIMEOUT_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.terminate()  # mpirun passes it on to its ranks
                process.wait()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()


def absence(name: str) -> str | None:
    """Why a peer cannot be measured here; None where it can."""
    module = {GLOO: "torch", OPENMPI: "mpi4py"}[name]
    if find_spec(module) is None:
        return f"there is no {module}; pip install 'dsml_gpu[peers]'"
    if name == OPENMPI:
        if shutil.which("mpirun") is None:
            return "there is no mpirun; on Debian and Ubuntu: apt install openmpi-bin libopenmpi-dev"
        if "Open MPI" not in subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False).stdout:
            return "mpirun is not that of Open MPI"
    return None


def commands(name: str, nranks: int, folder: str, worker: Sequence[str]) -> list[list[str]]:
    """What starts a peer's ranks."""
    if name == GLOO:
        return [[*worker, f"{folder}/store", str(rank), str(nranks)] for rank in range(nranks)]
    as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    # Its ranks are bound to no core, as those of the others.
    return [["mpirun", "-n", str(nranks), "--oversubscribe", "--bind-to", "none", *as_root, *worker]]


def slowest(ranks_s: Sequence[Sequence[float]]) -> list[float]:
    """The times of the slowest rank, operation by operation."""
    return [max(times_s) for times_s in zip(*ranks_s, strict=True)]
