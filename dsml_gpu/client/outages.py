"""How long a client goes on trying when its coordinator does not answer, and what it says of that."""

from __future__ import annotations

import logging
import random
import threading
import time
from dataclasses import dataclass

from dsml_gpu.errors import PeerUnavailable

log = logging.getLogger(__name__)

#: Time before the second try; it doubles up to the longest.
FIRST_BACKOFF_S = 0.05
LONGEST_BACKOFF_S = 1.0


class CoordinatorLost(PeerUnavailable):
    """The coordinator cannot be reached, or the connection broke: it is not known whether it has got the request."""


@dataclass(slots=True)
class Tries:
    """The tries of one call.

    Attributes:
        until_s: no more tries from then on, by `time.monotonic`.
        backoff_s: before the next one.
    """

    until_s: float
    backoff_s: float = FIRST_BACKOFF_S

    def next_wait_s(self) -> float | None:
        """How long to wait before the next try; None: there is none."""
        remaining_s = self.until_s - time.monotonic()
        if remaining_s <= 0:
            return None
        # Clients that have lost the same coordinator are not to come back all at once.
        wait_s = self.backoff_s * random.uniform(0.5, 1.0)
        self.backoff_s = min(2 * self.backoff_s, LONGEST_BACKOFF_S)
        return min(wait_s, remaining_s)


class Outages:
    """Says once that a coordinator is lost, and once that it is back, however many calls notice. Thread-safe.

    Attributes:
        lost: it did not answer when it was last tried.
    """

    def __init__(self, target: str, reconnect_s: float) -> None:
        self._target = target
        self._reconnect_s = reconnect_s
        self._lock = threading.Lock()
        self._since_s = 0.0
        self.lost = False

    def begins(self) -> None:
        """A call did not reach the coordinator, and is tried again."""
        with self._lock:
            if self.lost:
                return
            self.lost, self._since_s = True, time.monotonic()
        log.warning("the coordinator at %s does not answer; trying again for %g s", self._target, self._reconnect_s)

    def ends(self) -> None:
        """The coordinator has answered."""
        with self._lock:
            if not self.lost:
                return
            self.lost, elapsed_s = False, time.monotonic() - self._since_s
        log.warning("the coordinator at %s answers again, after %.2f s", self._target, elapsed_s)
