"""Rows that show every two values of different factors together at least once: far fewer than all combinations."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

#: A factor's name, and the number of one of its values.
Setting = tuple[str, int]


def covering_rows(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A value of every factor for each row, so that all pairs of values come together. The same rows every time.

    Each row begins with a pair that no earlier one has, and takes for the other factors, one after the other, the value that
    makes the most new pairs with what the row has already; of equal ones the one that was taken the fewest times.
    """
    missing = dict.fromkeys(pairs_of(factors))
    taken: Counter[Setting] = Counter()
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for name in [name for name in factors if name not in row]:

            def merit(value: int, name: str = name, row: dict[str, int] = row) -> tuple[int, int]:
                new = sum(_pair(factors, (name, value), other) in missing for other in row.items())
                return new, -taken[name, value]

            row[name] = max(range(len(factors[name])), key=merit)
        taken.update(row.items())
        for one, other in itertools.combinations(row.items(), 2):
            missing.pop(_pair(factors, one, other), None)
        rows.append({name: factors[name][row[name]] for name in factors})
    return rows


def pairs_of(factors: Mapping[str, Sequence[Any]]) -> Iterator[tuple[Setting, Setting]]:
    """Every two values of different factors."""
    for one, other in itertools.combinations(factors, 2):
        for values in itertools.product(range(len(factors[one])), range(len(factors[other]))):
            yield (one, values[0]), (other, values[1])


def _pair(factors: Mapping[str, Sequence[Any]], one: Setting, other: Setting) -> tuple[Setting, Setting]:
    """In the order of factors."""
    first = next(name for name in factors if name in (one[0], other[0]))
    return (one, other) if one[0] == first else (other, one)
