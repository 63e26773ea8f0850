"""Devices that register and leave under traffic: nothing may fail."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from dsml_gpu.chaos.exercise import Stuck
from dsml_gpu.chaos.fleets import OwnFleet, reachable
from dsml_gpu.chaos.report import HANG, LOST, ON_ALL, Outcome, Summary
from dsml_gpu.chaos.traffic import Traffic

#: Traffic goes on at least so long in each state.
_PHASE_S = 0.3


def run(summary: Summary, fleet: OwnFleet, ndevices: int, n: int, nbytes: int, say: Callable[[str], None]) -> None:
    """Has a device come and leave `n` times. Ends early where an operation has not come back.

    Args:
        ndevices: that are there all the time.
        nbytes: of each rank's buffer.
    """
    rng = random.Random(summary.seed)
    traffic = Traffic(fleet.client, fleet.members(ndevices, {}), nbytes, summary.seed)
    for number in range(1, n + 1):
        try:
            outcome = _come_and_leave(fleet, traffic, f"trial {number}", rng)
        except Stuck as error:
            summary.outcomes.append(Outcome(f"trial {number}", HANG, True, note=str(error)))
            return
        summary.outcomes.append(outcome)
        say(str(outcome))
    traffic.close()


def _come_and_leave(fleet: OwnFleet, traffic: Traffic, what: str, rng: random.Random) -> Outcome:
    wrong, done, failed = len(traffic.wrong), traffic.done, traffic.failed
    came: list[int] = []
    _beside(traffic, lambda: came.append(fleet.join()))
    (device_id,) = came
    traffic.grow([device_id])
    joined = device_id in traffic.device_ids
    _for(traffic, rng.uniform(0, _PHASE_S))
    traffic.harm(device_id)
    statuses: list[int] = []
    in_traffic = traffic.done
    _beside(traffic, lambda: statuses.append(fleet.leave(device_id)))
    in_traffic = traffic.done - in_traffic
    _for(traffic, rng.uniform(0, _PHASE_S))
    found = traffic.wrong[wrong:]
    if statuses != [0]:
        found.append(f"device {device_id} left with exit status {statuses}, not 0")
    if device_id in traffic.device_ids or device_id in reachable(fleet.client):
        found.append(f"device {device_id} has left, and is still there")
    traffic.refill()
    return Outcome(
        f"{what}: device {device_id} comes and leaves, {in_traffic} operations while it left",
        LOST if traffic.failed > failed else ON_ALL,
        joined and in_traffic > 0,
        tuple(found),
        operations=traffic.done - done,
    )


def _for(traffic: Traffic, seconds: float) -> None:
    ends_s = time.monotonic() + seconds
    traffic.step()
    while time.monotonic() < ends_s:
        traffic.step()


def _beside(traffic: Traffic, work: Callable[[], None]) -> None:
    """Operations go on while something else happens, and raises what that raises."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  raised below
            errors.append(error)

    thread = threading.Thread(target=run, name="beside", daemon=True)
    thread.start()
    while thread.is_alive():
        traffic.step()
    thread.join()
    if errors:
        raise errors[0]
