"""Places in the code where a fault can be ordered, for tests and ``dsml-gpu chaos``.

Code that recovers is only known to work where it was seen to. A process is told at its start which faults it is to have
(`order`); code that passes such a place calls `reach`, which costs a look into an empty dictionary where none is ordered.
Every fault that happens is written to a file first, so that whoever ordered it can tell that it did.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

#: What a fault can be.
ACTIONS = ("kill", "stop", "fail", "delay")
#: What `delay` is of.
_DELAY_S = 0.5


class FailpointReached(Exception):
    """What the action ``fail`` raises: a defect that nobody has foreseen."""


@dataclass(slots=True)
class Fault:
    """One fault that is ordered.

    Attributes:
        place: name of the place.
        action: one of `ACTIONS`: SIGKILL or SIGSTOP to this process, an exception, or a pause.
        where: what else must be so, for example ``{"rank": "2"}``; compared as text.
        skip: so often the place is passed before.
        log: gets a line when the fault happens.
    """

    place: str
    action: str
    where: dict[str, str] = field(default_factory=dict)
    skip: int = 0
    log: Path | None = None


_ordered: dict[str, list[Fault]] = {}


def parse(text: str, log: Path | None = None) -> Fault:
    """A fault from ``PLACE:ACTION[@KEY=VALUE,...]``, for example ``passes.commit:kill@rank=1,skip=3``.

    Raises:
        ValueError: it is not of that form.
    """
    order, _, conditions = text.partition("@")
    place, _, action = order.partition(":")
    if not place or action not in ACTIONS:
        raise ValueError(f"expected PLACE:ACTION[@KEY=VALUE,...] with an action of {', '.join(ACTIONS)}, got {text!r}")
    where = dict(condition.split("=", 1) for condition in conditions.split(",") if "=" in condition)
    return Fault(place, action, where, int(where.pop("skip", "0")), log)


def order(fault: Fault) -> None:
    """The fault happens once, when its place is reached."""
    _ordered.setdefault(fault.place, []).append(fault)


def are_ordered() -> bool:
    """Whether any fault is. Otherwise code need not stop at its places."""
    return any(_ordered.values())


def reach(place: str, **where: object) -> None:
    """The code has come to a place.

    Args:
        where: what tells this visit from others, for example the rank.

    Raises:
        FailpointReached: that is what was ordered.
    """
    for fault in tuple(_ordered.get(place, ())):
        if all(str(where.get(key)) == value for key, value in fault.where.items()):
            _happen(fault, where)


def _happen(fault: Fault, where: dict[str, object]) -> None:
    if fault.skip:
        fault.skip -= 1
        return
    _ordered[fault.place].remove(fault)
    if fault.log is not None:
        line = f"{fault.place}:{fault.action} {' '.join(f'{key}={value}' for key, value in where.items())}\n"
        with fault.log.open("a", encoding="utf-8") as log:
            log.write(line)
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.action == "delay":
        time.sleep(_DELAY_S)
    else:
        raise FailpointReached(f"failpoint {fault.place}")
