"""An algorithm: a pure function that makes schedules, with its name and where it comes from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsml_gpu.schedules.collectives import COLLECTIVES, Layout, Roles
from dsml_gpu.schedules.schedule import Schedule
from dsml_gpu.schedules.verify import InvalidSchedule


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way to run one collective.

    Attributes:
        collective: a key of `COLLECTIVES`.
        name: for people, answers and requests.
        build: ``(nranks) -> Schedule``. It takes what else it needs by these names: ``root`` of a rooted collective,
            ``pairs`` of a send/recv, ``hosts`` (the host of each rank, as numbers from 0).
        source: authors and year of what it follows.
    """

    collective: str
    name: str
    build: Callable[..., Schedule]
    source: str

    def schedule(
        self, nranks: int, *, root: int = 0, pairs: tuple[tuple[int, int], ...] = (), hosts: tuple[int, ...] = ()
    ) -> Schedule:
        """The schedule for so many ranks.

        Args:
            root: of a rooted collective.
            pairs: of a send/recv.
            hosts: the host of each rank; empty: all on one.

        Raises:
            InvalidSchedule: it is wrong, or for something else than what was asked for.
        """
        offered: dict[str, Any] = {"root": root, "pairs": pairs, "hosts": hosts or (0,) * nranks}
        asked = inspect.signature(self.build).parameters
        schedule = self.build(nranks, **{name: value for name, value in offered.items() if name in asked})
        # The proof is of what the schedule itself says that it computes. What does not concern the collective is ignored.
        collective = COLLECTIVES[self.collective]
        roles = Roles(nranks, root if collective.rooted else 0, pairs if collective.layout is Layout.LISTED else ())
        if (schedule.collective, schedule.roles) != (self.collective, roles):
            raise InvalidSchedule(
                f"{self.name} has built a schedule for {schedule.collective} with {schedule.roles}, not for "
                f"{self.collective} with {roles}"
            )
        return schedule
