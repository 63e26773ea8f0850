"""The collectives that are tried: what they are, and how they are called. Data is in `checks`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dsml_gpu.client import Communicator, DeviceArray
from dsml_gpu.client.results import CollectiveResult
from dsml_gpu.errors import InvalidValue

#: What can be tried. In all but the first two a buffer has one block for each rank.
COLLECTIVES = ("all_reduce", "broadcast", "reduce_scatter", "all_gather", "all_to_all")
#: Of these each rank gets the same.
SAME_EVERYWHERE = ("all_reduce", "broadcast")
REDUCTIONS = ("all_reduce", "reduce_scatter")


@dataclass(frozen=True, slots=True)
class Operation:
    """One collective on ranks 0 .. nranks-1.

    Attributes:
        collective: one of `COLLECTIVES`.
        elements: of a rank's buffer; where it has one block for each rank, of a block.
        dtype: name of a numpy type.
        op: ``"sum"``, ``"max"`` or ``"min"``; without meaning where nothing is reduced.
        root: of a broadcast.

    Raises:
        InvalidValue: on construction, where it cannot be.
    """

    collective: str
    nranks: int
    elements: int
    dtype: str = "int64"
    op: str = "sum"
    algorithm: str = "auto"
    transport: str = "auto"
    in_place: bool = False
    root: int = 0

    def __post_init__(self) -> None:
        if self.collective not in COLLECTIVES:
            raise InvalidValue(f"unknown collective {self.collective!r}; known: {', '.join(COLLECTIVES)}")
        if self.nranks < 1 or self.elements < 1:
            raise InvalidValue(f"at least 1 rank and 1 element are needed, got {self.nranks} and {self.elements}")
        if not 0 <= self.root < self.nranks:
            raise InvalidValue(f"root {self.root} is not one of {self.nranks} ranks")

    @property
    def blocks(self) -> int:
        """Blocks of the larger one of a rank's buffers."""
        return 1 if self.collective in SAME_EVERYWHERE else self.nranks

    @property
    def input_elements(self) -> int:
        """Of each rank's input."""
        return self.elements * (1 if self.collective == "all_gather" and not self.in_place else self.blocks)

    @property
    def output_elements(self) -> int:
        """Of each rank's output, where it is another array than the input."""
        return self.elements * (1 if self.collective == "reduce_scatter" else self.blocks)

    @property
    def nbytes(self) -> int:
        """Of the larger one of a rank's buffers."""
        return self.elements * self.blocks * np.dtype(self.dtype).itemsize

    def needs(self, rank: int) -> bool:
        """Whether it cannot be done without a rank."""
        return self.collective == "broadcast" and rank == self.root

    def of_ranks(self, nranks: int) -> Operation:
        """The same on another number of ranks."""
        return replace(self, nranks=nranks, root=self.root % nranks)

    def __str__(self) -> str:
        reduced = f" {self.op}" if self.collective in REDUCTIONS else ""
        rooted = f" root {self.root}" if self.collective == "broadcast" else ""
        return (
            f"{self.collective}{reduced}{rooted} {self.nranks} ranks {self.nbytes} B {self.dtype} {self.algorithm} "
            f"{self.transport} {'in place' if self.in_place else 'out of place'}"
        )


def call(
    comm: Communicator,
    operation: Operation,
    inputs: Sequence[DeviceArray],
    outputs: Sequence[DeviceArray] | None,
    timeout_s: float,
) -> CollectiveResult:
    """Runs an operation.

    Args:
        inputs: one of each rank.
        outputs: likewise; None: in place.

    Raises:
        DsmlError: what it fails with.
    """
    options: dict[str, Any] = {"algorithm": operation.algorithm, "timeout_s": timeout_s}
    if operation.collective in REDUCTIONS:
        options["op"] = operation.op
    if operation.collective == "broadcast":
        source = None if outputs is None else inputs[operation.root]
        result = comm.broadcast(inputs if outputs is None else outputs, source, root=operation.root, **options)
    else:
        result = getattr(comm, operation.collective)(inputs, outputs, **options)
    assert result is not None, "outside of groups there is one"
    return result
