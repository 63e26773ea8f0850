"""Devices, and coordinators, that die at every place of their code, at every rank, in each phase of an operation.

    python -m tests.recovery.failpoint_matrix                       # all of them, some ten minutes
    python -m tests.recovery.failpoint_matrix --only "p2p restore"  # those whose names have all of these words
    python -m tests.recovery.failpoint_matrix --list

Each case of `tests.recovery.failpoint_cases` orders faults, all of which must happen, or none can. Whatever happens, the
operation answers within ten seconds, and what it says is so: every element of every rank that is left is looked at. Then
the communicator must work on, or, where it is to fail, another one of those that are left.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import dsml_gpu
from dsml_gpu.chaos import checks
from dsml_gpu.chaos.exercise import HANG_S, Answer, Exercise, Stuck
from dsml_gpu.chaos.fleets import OwnFleet, wait_until
from dsml_gpu.chaos.report import ON_ALL, RESTARTED
from dsml_gpu.cli.fleet import ServerProcess
from dsml_gpu.errors import DsmlError, OperationTimeout
from tests.coordinator_kills import devices
from tests.recovery.failpoint_cases import COORDINATOR, LOADING, NDEVICES, NRANKS, Case, Way, cases
from tests.support.coordinators import Coordinators

_DEVICE_OPTIONS = ("--memory", "64MiB", "--slice", "16KiB")
#: After an answer, by then what was to happen has happened: what is kept is given up only then.
_FIRES_S = 5.0


@dataclass(frozen=True)
class Ran:
    """What has become of a case.

    Attributes:
        fired: faults that have happened.
        wrong: what was wrong, for people; empty: it has passed.
    """

    fired: int
    wrong: list[str]


class Bench:
    """Servers for cases, which are started when they are first needed. Ends with its ``with`` block."""

    def __init__(self) -> None:
        self._fleets: dict[bool, OwnFleet] = {}
        self._stack = contextlib.ExitStack()
        self._servers: list[ServerProcess] | None = None

    def fleet(self, way: Way) -> OwnFleet:
        """Device servers that register with their coordinator."""
        if way.lane not in self._fleets:
            options = () if way.lane else ("--no-lane",)
            self._fleets[way.lane] = OwnFleet(NDEVICES, (*_DEVICE_OPTIONS, *options))
        return self._fleets[way.lane]

    def servers(self) -> list[ServerProcess]:
        """Device servers for coordinators that are told of them."""
        if self._servers is None:
            self._servers = self._stack.enter_context(devices())
        return self._servers

    def run(self, case: Case, seed: int = 1) -> Ran:
        """Runs a case.

        Args:
            seed: of the data.
        """
        with tempfile.TemporaryDirectory() as folder:
            if case.faults[0][0] == COORDINATOR:
                return _with_coordinators(self.servers(), case, seed, Path(folder))
            ran = _with_devices(self.fleet(case.way), case, seed, Path(folder))
        if ran.wrong:  # the next case is to find servers that are well
            self._fleets.pop(case.way.lane).stop()
        return ran

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        for fleet in self._fleets.values():
            fleet.stop()
        self._stack.close()


# ---- faults of devices ----------------------------------------------------------------------------------------------------


def _with_devices(fleet: OwnFleet, case: Case, seed: int, folder: Path) -> Ran:
    device_ids = fleet.members(NDEVICES, dict(case.faults))

    def fired() -> int:
        return sum(fleet.fired_s(device_ids[place]) is not None for place, _ in case.faults)

    def all_fired() -> bool:
        return fired() == len(case.faults)

    def await_faults() -> None:
        if not case.unmet:
            wait_until(all_fired, "all faults have happened", _FIRES_S)

    try:
        with _killed(fleet, None if case.kills is None else device_ids[case.kills], all_fired):
            if case.way.transport == "checkpoint":
                wrong = _try_checkpoint(fleet, case, device_ids, folder, await_faults)
            elif case.on_failure == "restore":
                wrong = _try_with_spares(fleet, case, device_ids, seed, folder, await_faults)
            else:
                wrong = _try(fleet, case, device_ids, seed, await_faults)
    except (DsmlError, Stuck) as error:
        wrong = [f"{type(error).__name__}: {error}"]
    finally:
        for place in case.victims | {device for device, _ in case.faults}:
            fleet.repair(device_ids[place])
    happened = fired()
    if case.unmet and happened:
        wrong.append(f"{happened} of the faults have happened, though {case.unmet}")
    return Ran(happened, wrong)


@contextlib.contextmanager
def _killed(fleet: OwnFleet, device_id: int | None, when: Callable[[], bool]) -> Iterator[None]:
    """Within the block a process is killed as soon as something holds. Raises PeerUnavailable where it does not."""
    if device_id is None:
        yield
        return

    def kill() -> None:
        wait_until(when, f"the moment to kill device {device_id}", HANG_S)
        fleet.signal(device_id, signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill)
        yield
        killing.result()


def _try(fleet: OwnFleet, case: Case, device_ids: Sequence[int], seed: int, await_faults: Callable[[], None]) -> list[str]:
    operation = case.way.operation
    with Exercise(fleet.client, device_ids[:NRANKS], operation, seed, on_failure=case.on_failure) as exercise:
        exercise.harmed.update(case.victims)
        answer = exercise.run()
        await_faults()  # not those of the operations that follow
        wrong = _judged(exercise, answer, case)
        if answer.result is None:
            wrong += [
                f"the error does not name device {device_ids[rank]}: {answer.note}"
                for rank in case.victims
                if f"device {device_ids[rank]}" not in answer.note
            ]
        elif case.on_failure != "fail":
            wrong += exercise.go_on() + exercise.go_on()
    if case.on_failure == "fail":
        left = [device_ids[rank] for rank in range(NRANKS) if rank not in case.victims]
        with Exercise(fleet.client, left, operation.of_ranks(len(left)), seed + 1) as exercise:
            ended, more = exercise.judge(exercise.run())
            wrong += more + [f"the next communicator: {ended}"] * (ended != ON_ALL)
    return wrong


def _judged(exercise: Exercise, answer: Answer, case: Case) -> list[str]:
    ended, wrong = exercise.judge(answer)
    if ended not in case.ends:
        wrong.append(f"ended {ended}, expected {' or '.join(case.ends)}: {answer.note}")
    return wrong + _late(answer)


def _late(answer: Answer) -> list[str]:
    took_s = answer.ended_s - answer.began_s
    return [f"it took {took_s:.1f} s, {HANG_S:g} are allowed"] if took_s > HANG_S else []


def _try_with_spares(
    fleet: OwnFleet, case: Case, device_ids: Sequence[int], seed: int, folder: Path, await_faults: Callable[[], None]
) -> list[str]:
    """Runs the operation twice: by then all ranks are there again, and all that they have is looked at each time."""
    operation, wrong = case.way.operation, []
    harmed = {device_ids[place] for place in case.victims}
    with Exercise(fleet.client, device_ids[:NRANKS], operation, seed, on_failure="restore") as exercise:
        exercise.save(folder / "checkpoint")
        contents = exercise.contents
        for end in (*case.ends, RESTARTED):
            answer = exercise.run()
            await_faults()
            wrong += _late(answer)
            if answer.result is None:
                return [*wrong, f"it failed: {answer.note}"]
            members = answer.result.device_ids
            # Of one that has done its part, and died, the result has it; of another one that has come, what it loaded.
            exercise.harmed = {rank for rank, device_id in enumerate(members) if device_id in harmed}
            if len(members) != NRANKS or bool(exercise.harmed) != (end == ON_ALL):
                wrong.append(f"devices {members} took part, of which {sorted(harmed & {*members})} have died: not {end}")
            after = checks.expected(operation, contents, range(NRANKS))
            wrong += checks.wrong(operation, contents, exercise.read(), range(NRANKS))
            contents = [contents[rank] if rank in exercise.harmed else after[rank] for rank in range(NRANKS)]
    return wrong


def _try_checkpoint(
    fleet: OwnFleet, case: Case, device_ids: Sequence[int], folder: Path, await_faults: Callable[[], None]
) -> list[str]:
    """Makes two checkpoints, and restores the last complete one, at first on all ranks, then on those that are left."""
    ((_, what),) = case.faults
    first, second = ([np.full(case.way.nbytes // 8, 10 * number + rank) for rank in range(NRANKS)] for number in (1, 2))
    with fleet.client.communicator(device_ids=device_ids[:NRANKS]) as comm:
        arrays = comm.array(first)
        comm.checkpoint(folder, {"x": arrays}).wait(HANG_S)
        for array, data in zip(arrays, second, strict=True):
            array.set(data)
        try:
            if what.startswith(LOADING):
                comm.restore(folder, {"x": arrays}, timeout_s=HANG_S)
            else:
                comm.checkpoint(folder, {"x": arrays}).wait(HANG_S)
        except OperationTimeout as error:
            return [f"no answer: {error}"]
        except DsmlError:
            pass
        else:
            return ["it ended well, without a rank"]
        await_faults()
        comm.all_reduce(arrays, op="max")  # goes on without the victim
        restored = comm.restore(folder, timeout_s=HANG_S)["x"]
        if not np.array_equal(np.concatenate([array.get() for array in restored]), np.concatenate(first)):
            return ["it is not the last complete checkpoint that was restored"]
    return []


# ---- faults of the coordinator --------------------------------------------------------------------------------------------


def _with_coordinators(servers: Sequence[ServerProcess], case: Case, seed: int, folder: Path) -> Ran:
    """The client does not ask again: it waits until the next coordinator is there."""
    ((_, fault),) = case.faults
    coordinators = Coordinators(folder, servers, folder / "state")
    try:
        coordinators.start(fault)
        with (
            dsml_gpu.connect(coordinators.address, timeout_s=HANG_S, reconnect_s=HANG_S) as client,
            Exercise(client, range(1, NRANKS + 1), case.way.operation, seed) as exercise,
            ThreadPoolExecutor(1) as pool,
        ):
            answers = pool.submit(exercise.run)
            wait_until(lambda: answers.done() or coordinators.now.process.poll() is not None, "it has ended, or died")
            fired = coordinators.faults.count("\n")
            if fired:
                coordinators.ends()
                coordinators.start()
            wrong = _judged(exercise, answers.result(), case) + exercise.go_on()
    except (DsmlError, Stuck) as error:
        fired, wrong = coordinators.faults.count("\n"), [f"{type(error).__name__}: {error}"]
    finally:
        coordinators.stop()
    if bool(fired) == bool(case.unmet):
        wrong.append(f"the fault has happened, though {case.unmet}" if fired else "the fault has not happened")
    return Ran(fired, wrong)


# ---- the command ----------------------------------------------------------------------------------------------------------


def main() -> int:
    """Runs cases; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORDS", help="cases that have all of these in their names")
    parser.add_argument("--list", action="store_true", help="only tell which cases there are")
    parser.add_argument("--seed", type=int, default=1, help="of the data")
    options = parser.parse_args()
    chosen = [case for case in cases() if all(word in str(case) for word in options.only.split())]
    if options.list:
        for case in chosen:
            print(f"{case}{f': {case.unmet}' if case.unmet else ''}")
        return 0
    fired = passed = 0
    with Bench() as bench:
        for case in chosen:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                ran = bench.run(case, options.seed)
            fired += bool(ran.fired)
            passed += not ran.wrong
            print(f"{'FAILED' if ran.wrong else 'passed'}  {case}", *ran.wrong, sep="\n        ", flush=True)
            if ran.wrong:
                print(said.getvalue(), file=sys.stderr)
    unmet = sum(bool(case.unmet) for case in chosen)
    print(f"{len(chosen)} cases: {fired} with faults that happened, {unmet} with faults that cannot; {passed} passed")
    return 0 if chosen and passed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
