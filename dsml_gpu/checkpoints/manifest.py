"""The manifest of a checkpoint: which files there are, what is in them, and the digests that all their bytes must have.

It is JSON: a list with one record on each line, beside the digest of its text. The first record is about the checkpoint, and
each of the others about the file of one rank.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
from collections.abc import Set
from dataclasses import asdict, dataclass, replace
from typing import Any

from dsml_gpu.checkpoints.folders import TEMPORARY, Folder
from dsml_gpu.errors import CheckpointDamaged, CheckpointNotFound, InvalidValue
from dsml_gpu.reduction.dtypes import DTYPES

MANIFEST = "manifest.json"
#: An array has a digest for each piece of this size: a damaged place is known so well, and no piece is large.
PIECE_BYTES = 1 << 20
_FORMAT = "dsml_gpu checkpoint"
_VERSION = 1
_OPENING, _CLOSING = b"[\n", b"\n]\n"
_RECORD = re.compile(rb'\["([0-9a-f]{32})", (.*)\](,?)', re.DOTALL)
#: Files that checkpoints leave behind: shards, whole or not, and manifests that did not get their name.
_OURS = re.compile(rf"shard-([0-9a-f]+)-.*\.safetensors({TEMPORARY})?|{re.escape(MANIFEST)}{TEMPORARY}")


@dataclass(frozen=True, slots=True)
class SavedArray:
    """An array in the file of a rank.

    Attributes:
        dtype: name in ``enum DataType``.
        addr: where it was in the device's memory.
        start: its first byte in the file.
        digests: of its pieces.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    addr: int
    start: int
    digests: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def same_as(self, other: SavedArray) -> bool:
        """Whether both hold the same."""
        return (self.dtype, self.shape, self.digests) == (other.dtype, other.shape, other.digests)


@dataclass(frozen=True, slots=True)
class SavedFile:
    """The file of a rank.

    Attributes:
        header_nbytes: of what comes before the arrays, which follow each other without gaps.
    """

    name: str
    nbytes: int
    header_nbytes: int
    header_digest: str
    arrays: tuple[SavedArray, ...]

    def array(self, name: str) -> SavedArray:
        """Raises InvalidValue where there is none of that name."""
        for array in self.arrays:
            if array.name == name:
                return array
        raise InvalidValue(f"{self.name} has no array {name!r}; it has {', '.join(array.name for array in self.arrays)}")

    def only(self, name: str) -> SavedFile:
        """The same file, with one array of those that are in it."""
        return replace(self, arrays=(self.array(name),))

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def of_json(cls, text: str) -> SavedFile:
        """Raises InvalidValue where it is not what `to_json` gave."""
        try:
            return cls.of_record(json.loads(text))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidValue(f"not the description of a file: {error!r}") from None

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> SavedFile:
        arrays = tuple(
            SavedArray(**one | {"shape": tuple(one["shape"]), "digests": tuple(one["digests"])}) for one in record["arrays"]
        )
        unknown = [array.dtype for array in arrays if array.dtype not in DTYPES]
        if unknown:
            raise ValueError(f"unknown data type {unknown[0]}")
        return cls(**record | {"arrays": arrays})


@dataclass(frozen=True, slots=True)
class Manifest:
    """A complete checkpoint.

    Attributes:
        generation: in the names of its files; no two checkpoints have the same.
        files: of rank r is ``files[r]``.
    """

    generation: str
    files: tuple[SavedFile, ...]

    @property
    def nranks(self) -> int:
        return len(self.files)

    @property
    def names(self) -> list[str]:
        """Of its arrays, which all ranks have."""
        return [array.name for array in self.files[0].arrays]

    def parts(self, name: str) -> list[SavedArray]:
        """What each rank had of an array. Raises InvalidValue where there is none of that name."""
        return [file.array(name) for file in self.files]

    def encode(self) -> bytes:
        about = {"format": _FORMAT, "version": _VERSION, "generation": self.generation, "nranks": self.nranks}
        bodies = [json.dumps(about).encode(), *(file.to_json().encode() for file in self.files)]
        records = [b'["%s", %s]' % (digest(body).encode(), body) for body in bodies]
        return _OPENING + b",\n".join(records) + _CLOSING

    @classmethod
    def decode(cls, raw: bytes, where: str) -> Manifest:
        """What `encode` gave.

        Args:
            where: the file, for people.

        Raises:
            CheckpointDamaged: it is not what was written.
            InvalidValue: a version that this one does not know.
        """
        about, *files = (json.loads(body) for body in _checked_bodies(raw, where))
        if about.get("format") != _FORMAT:
            raise damaged(where, 0, len(raw))
        if about.get("version") != _VERSION:
            raise InvalidValue(f"{where} has version {about.get('version')}, expected {_VERSION}")
        if len(files) != about["nranks"]:
            raise CheckpointDamaged(f"{where}: bytes 0..{len(raw)} have {len(files)} files, {about['nranks']} were written")
        return cls(about["generation"], tuple(map(SavedFile.of_record, files)))


def digest(data: Any) -> str:
    """Of a piece. BLAKE2b with 128 bits.

    It sees every flipped bit, and two ranks' arrays of one digest are the same: a CRC-32 is 5 times as fast (5.7 GB/s
    against 1.1 GB/s), but takes different bytes for the same once in 2**32 times. SHA-256 has 1.9 GB/s only where the
    processor has instructions for it.
    """
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digests(data: memoryview) -> tuple[str, ...]:
    """Of all pieces of an array."""
    return tuple(digest(data[start : start + PIECE_BYTES]) for start in range(0, data.nbytes, PIECE_BYTES))


def damaged(where: str, start: int, stop: int, why: str = "are not what was written") -> CheckpointDamaged:
    """The error about bytes ``start .. stop - 1`` of a file."""
    return CheckpointDamaged(f"{where}: bytes {start}..{stop} {why}")


def new_generation() -> str:
    return secrets.token_hex(8)


def shard_name(generation: str, rank: int, nranks: int) -> str:
    return f"shard-{generation}-{rank:05}-of-{nranks:05}.safetensors"


def read_manifest(folder: Folder) -> Manifest:
    """The checkpoint of a folder.

    Raises:
        CheckpointNotFound: there is no complete one.
        CheckpointDamaged: the manifest is not what was written.
    """
    where = f"{folder.url}/{MANIFEST}"
    try:
        raw = folder.read(MANIFEST, 0, folder.size(MANIFEST))
    except CheckpointNotFound as error:
        raise CheckpointNotFound(f"there is no complete checkpoint in {folder.url}: {error}") from None
    return Manifest.decode(raw, where)


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """The last step of a checkpoint, whose files are whole: from now on it is the folder's."""
    folder.put(MANIFEST, manifest.encode())


def remove_older(folder: Folder, kept: Set[str]) -> None:
    """Removes what earlier checkpoints, complete or not, have left in a folder.

    Args:
        kept: generations that stay.
    """
    for name in folder.names():
        match = _OURS.fullmatch(name)
        if match and match[1] not in kept:
            folder.remove(name)


def _checked_bodies(raw: bytes, where: str) -> list[bytes]:
    """The texts of all records, each of which has its digest."""
    if not raw.startswith(_OPENING):
        raise damaged(where, 0, len(_OPENING))
    if not raw.endswith(_CLOSING) or len(raw) < len(_OPENING) + len(_CLOSING):
        raise damaged(where, max(0, len(raw) - len(_CLOSING)), len(raw))
    start, bodies = len(_OPENING), []
    lines = raw[start : -len(_CLOSING)].split(b"\n")
    for number, line in enumerate(lines, 1):
        match = _RECORD.fullmatch(line)
        if match is None or digest(match[2]).encode() != match[1] or bool(match[3]) is (number == len(lines)):
            # With its line break, which may be what is wrong.
            raise damaged(where, start, start + len(line) + 1)
        bodies.append(match[2])
        start += len(line) + 1
    return bodies
