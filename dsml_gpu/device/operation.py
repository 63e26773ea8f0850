"""What a rank is asked to run: collectives, each as a dataflow over blocks of its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dsml_gpu.device.buckets import Piece
from dsml_gpu.device.dataflow import Dataflow
from dsml_gpu.reduction import Operator


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a collective's data on one rank.

    Attributes:
        elements: its length.
        send: address of what the rank has of it at the start; None: nothing, or a token of zeros.
        recv: address of the rank's result; None: it passes through. The same as `send` where it is in place.
        pieces: of what the block is gathered; empty: it is in one place. `send` and `recv` are then no addresses.
    """

    elements: int
    send: int | None
    recv: int | None
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True, slots=True)
class Operation:
    """One collective on one rank.

    Attributes:
        dataflow: this rank's moves.
        blocks: those of the dataflow. No two ranges overlap but the two of a block that is in place.
        weight: what the rank has at the start is multiplied by it; None: it is not.
        copies_input: ranges of `send` may overlap those of `recv` after all: the input is copied first.
    """

    dataflow: Dataflow
    blocks: tuple[Block, ...]
    dtype: np.dtype[Any]
    operator: Operator
    weight: np.generic | None = None
    copies_input: bool = False
