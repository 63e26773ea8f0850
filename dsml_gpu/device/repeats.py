"""Requests that come again, because a coordinator was killed before it had recorded the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

M = TypeVar("M")

#: Answers are kept for so many requests.
MAX_ANSWERS = 1024


class Repeats:
    """The last answers of one device server, by the key of the request; not of requests that were refused."""

    def __init__(self) -> None:
        self._answers: dict[str, object] = {}

    def once(self, key: str, work: Callable[[], M]) -> M:
        """The answer of a request, which is done unless it was before.

        Args:
            key: no other request has it; empty: it is done in any case.
        """
        if not key:
            return work()
        if key not in self._answers:
            self._answers[key] = work()
            if len(self._answers) > MAX_ANSWERS:
                del self._answers[next(iter(self._answers))]
        answer: M = self._answers[key]  # type: ignore[assignment]
        return answer
