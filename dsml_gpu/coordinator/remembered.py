"""What calls lead to is remembered, since the same calls come again and again, until a communicator's devices change.

Calls name addresses. Those of a communicator that has ended, or has other devices now, do not come again; what is known of
them would stay until other calls have taken its place, and a coordinator that sees many devices die would grow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

_MAX_CALLS = 1024
_forgetting: list[Callable[[], None]] = []


def remembered(function: F) -> F:
    """A function of calls that gives the same for the same ones. It remembers the last `_MAX_CALLS`."""
    cached = lru_cache(maxsize=_MAX_CALLS)(function)
    _forgetting.append(cached.cache_clear)
    return cast("F", cached)


def forget() -> None:
    """A communicator has ended, or is about to go on with other devices. All functions forget all calls."""
    for clear in _forgetting:
        clear()
