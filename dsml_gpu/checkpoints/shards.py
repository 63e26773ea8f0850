"""The file of one rank, in the safetensors format, written and read piece by piece.

The format: the size of the header as 8 bytes little-endian, the header as JSON (type, shape and place of each array, padded
with spaces), then the arrays' bytes without gaps. https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from dsml_gpu.checkpoints.folders import Folder
from dsml_gpu.checkpoints.manifest import PIECE_BYTES, SavedArray, SavedFile, damaged, digest
from dsml_gpu.errors import InvalidValue, OperationAborted
from dsml_gpu.reduction.dtypes import DTYPES

#: Names of the format for those of ``enum DataType``.
DTYPE_NAMES = {
    "FLOAT64": "F64",
    "FLOAT32": "F32",
    "FLOAT16": "F16",
    "BFLOAT16": "BF16",
    "INT8": "I8",
    "UINT8": "U8",
    "INT32": "I32",
    "UINT32": "U32",
    "INT64": "I64",
    "UINT64": "U64",
}
#: A header of the format starts here, and the arrays where a multiple of it is.
_ALIGNMENT = 8
#: Name that the format has for itself.
_RESERVED = "__metadata__"
#: Of the format: its library reads no larger ones.
_MAX_HEADER_BYTES = 100_000_000
#: What was written is synced so often: progress is what stays, and the last sync is no long one.
_SYNC_BYTES = 64 << 20
#: Read at a time; a store far away takes its time for each request.
_BLOCK_PIECES = 16


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """An array to be written.

    Attributes:
        dtype: name in ``enum DataType``.
        addr: where it is in device memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    addr: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def header_of(specs: Sequence[ArraySpec]) -> tuple[bytes, dict[str, int]]:
    """The header of a file, and where in the file each array begins.

    Arrays with larger items come first, so that each is aligned to its items.

    Raises:
        InvalidValue: names that the format does not allow, or that are not unique; too many arrays.
    """
    starts: dict[str, int] = {}
    entries = {}
    end = 0
    for spec in sorted(specs, key=lambda spec: (-DTYPES[spec.dtype].itemsize, spec.name)):
        if not spec.name or spec.name == _RESERVED:
            raise InvalidValue(f"an array cannot be called {spec.name!r}")
        if spec.name in entries:
            raise InvalidValue(f"two arrays are called {spec.name!r}")
        starts[spec.name] = end
        end += spec.nbytes
        entries[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [starts[spec.name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _MAX_HEADER_BYTES:
        raise InvalidValue(f"a header of {len(text)} bytes for {len(specs)} arrays; the format allows {_MAX_HEADER_BYTES}")
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


def write_shard(
    folder: Folder,
    name: str,
    arrays: Iterable[tuple[ArraySpec, memoryview]],
    progress: Callable[[int], None] = lambda written: None,
    stopped: Callable[[], bool] = lambda: False,
) -> SavedFile:
    """Writes the file of a rank; it is there when this returns, and not before.

    Args:
        arrays: with their bytes.
        progress: is told how many bytes of arrays are written, now and then.
        stopped: whether to give up.

    Raises:
        InvalidValue: see `header_of`.
        StorageUnavailable: the file cannot be written.
        OperationAborted: it was stopped.
    """
    contents = {spec.name: (spec, data) for spec, data in arrays}
    header, starts = header_of([spec for spec, _ in contents.values()])
    writer = folder.create(name)
    try:
        writer.write(header)
        saved = []
        written = synced = 0
        for array, start in starts.items():  # in the order of the file
            spec, data = contents[array]
            found = []
            for place in range(0, data.nbytes, PIECE_BYTES):
                if stopped():
                    raise OperationAborted(f"{folder.url}/{name} was given up after {written} bytes")
                piece = data[place : place + PIECE_BYTES]
                found.append(digest(piece))
                writer.write(piece)
                written += piece.nbytes
                if written - synced >= _SYNC_BYTES:
                    writer.sync()
                    synced = written
                    progress(synced)
            saved.append(SavedArray(spec.name, spec.dtype, spec.shape, spec.addr, start, tuple(found)))
        writer.commit()
        progress(written)
    finally:
        writer.discard()
    return SavedFile(name, len(header) + written, len(header), digest(header), tuple(saved))


def check_header(folder: Folder, file: SavedFile) -> None:
    """Checks all of a file that is not an array.

    Raises:
        CheckpointNotFound: there is no such file.
        CheckpointDamaged: it is not what was written.
    """
    where, size = f"{folder.url}/{file.name}", folder.size(file.name)
    if size < file.nbytes:
        raise damaged(where, size, file.nbytes, "are missing")
    if size > file.nbytes:
        raise damaged(where, file.nbytes, size, "are more than was written")
    if digest(folder.read(file.name, 0, file.header_nbytes)) != file.header_digest:
        raise damaged(where, 0, file.header_nbytes)


def checked_bytes(folder: Folder, file: SavedFile, array: SavedArray, start: int, nbytes: int) -> Iterator[memoryview]:
    """The bytes from `start` on of an array, in pieces, each of which was checked.

    Raises:
        InvalidValue: the array has not so many.
        CheckpointNotFound, CheckpointDamaged: as `check_header`.
    """
    stop = start + nbytes
    if start < 0 or nbytes < 0 or stop > array.nbytes:
        raise InvalidValue(f"bytes {start}..{stop} of {array.name}, which has {array.nbytes}")
    if len(array.digests) != -(-array.nbytes // PIECE_BYTES):
        raise InvalidValue(f"{array.name} of {array.nbytes} bytes has {len(array.digests)} digests")
    if nbytes == 0:
        return
    first, last = start // PIECE_BYTES, (stop - 1) // PIECE_BYTES
    for block in range(first, last + 1, _BLOCK_PIECES):
        place = block * PIECE_BYTES
        end = min(array.nbytes, (min(block + _BLOCK_PIECES, last + 1)) * PIECE_BYTES)
        data = memoryview(folder.read(file.name, array.start + place, end - place))
        for number in range(block, min(block + _BLOCK_PIECES, last + 1)):
            low, high = number * PIECE_BYTES, min((number + 1) * PIECE_BYTES, array.nbytes)
            piece = data[low - place : high - place]
            if digest(piece) != array.digests[number]:
                raise damaged(f"{folder.url}/{file.name}", array.start + low, array.start + high)
            yield piece[max(start, low) - low : min(stop, high) - low]
