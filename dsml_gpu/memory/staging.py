"""Memory behind an arena in which results of passes wait until they go to where they belong.

It is shared as the arena is: who has the one open has the other. So what a process has staged can be brought to its
destinations by any other one, also when the process is gone. The first page tells those what they need to know:

- which round the results are of, and whether all of them are there: a process that has said so may have begun to write;
- whether this is the memory still. A process that wakes up when others have long taken their memory elsewhere reads
  nothing of use from where it was; it can tell before it says that its results are there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsml_gpu.errors import AddressOutOfRange
from dsml_gpu.memory.device_memory import DeviceNDArray

#: What comes before results.
HEADER_BYTES = 4096
_ROUND, _COMPLETE, _PRESENT, _LOG_ROUND, _LOG_OWNER, _LOG_BEGUN, _LOG_PIECE_BYTES = range(7)


class Log(NamedTuple):
    """What a staging says of a rank's part of a round that is done in pieces.

    Attributes:
        begun: so many pieces are written, but for the last one, which is staged and may be half written.
        piece_bytes: of each range of a piece.
    """

    begun: int
    piece_bytes: int


class Staging:
    """The staging of one device, in its own process or another one.

    Args:
        array: uint8, in host memory.
    """

    def __init__(self, array: DeviceNDArray) -> None:
        self._array = array
        self._address = int(array.__array_interface__["data"][0])
        self._header = memoryview(array[:56].view(np.uint64))  # which is faster than an array for single words

    @property
    def nbytes(self) -> int:
        """With the header."""
        return int(self._array.nbytes)

    def view(self, offset: int, nbytes: int) -> DeviceNDArray:
        """The bytes ``[offset, offset + nbytes)`` as a uint8 array, none of the header. Raises AddressOutOfRange."""
        if offset < HEADER_BYTES or offset + nbytes > self.nbytes:
            raise AddressOutOfRange(
                f"{nbytes} bytes at {offset} are outside of the staging, which is {HEADER_BYTES}..{self.nbytes}"
            )
        return self._array[offset : offset + nbytes]

    # Each word is written at once, and in this order: others may look at any time.

    def begin(self, round_id: int) -> None:
        """Results of a round are going to be staged; those of another one are no more."""
        self._header[_COMPLETE] = 0
        self._header[_ROUND] = round_id

    def complete(self) -> None:
        """All results of the round are there."""
        self._header[_COMPLETE] = 1

    def has(self, round_id: int) -> bool:
        """Whether all results of a round are there."""
        return bool(self._header[_ROUND] == round_id and self._header[_COMPLETE])

    def settle(self, round_id: int) -> bool:
        """The results of a round are not needed any more; returns whether they were there, or some of them."""
        if self._header[_ROUND] != round_id:
            return False
        self._header[_COMPLETE] = 0
        self._header[_ROUND] = 0
        return True

    def begin_log(self, round_id: int, owner: int, piece_bytes: int, begun: int = 0) -> None:
        """Pieces of a rank's part of a round are going to be written, the first so many of which are, or will be next."""
        self._header[_LOG_ROUND] = 0
        self._header[_LOG_OWNER] = owner
        self._header[_LOG_BEGUN] = begun
        self._header[_LOG_PIECE_BYTES] = piece_bytes
        self._header[_LOG_ROUND] = round_id

    def log(self, begun: int) -> None:
        """So many pieces are begun, the last of which is staged."""
        self._header[_LOG_BEGUN] = begun

    def logged(self, round_id: int, owner: int) -> Log | None:
        """How far a rank's part of a round has come; None: this staging knows nothing of it."""
        if self._header[_LOG_ROUND] != round_id or self._header[_LOG_OWNER] != owner:
            return None
        return Log(self._header[_LOG_BEGUN], self._header[_LOG_PIECE_BYTES])

    @property
    def is_present(self) -> bool:
        """Whether the device's memory has not moved since it was opened here."""
        return bool(self._header[_PRESENT])

    @is_present.setter
    def is_present(self, present: bool) -> None:
        self._header[_PRESENT] = present

    # Addresses of words, for compiled code that does the same.

    @property
    def complete_address(self) -> int:
        """Of the one to which `complete` writes 1."""
        return self._address + 8 * _COMPLETE

    @property
    def log_address(self) -> int:
        """Of the one to which `log` writes."""
        return self._address + 8 * _LOG_BEGUN

    @property
    def present_address(self) -> int:
        """Of the one that is 0 where `is_present` is False."""
        return self._address + 8 * _PRESENT
