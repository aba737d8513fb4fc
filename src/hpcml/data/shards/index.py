"""The index of a packed data set, and the description beside it: which sample lies where, and what it must be.

Both follow from the samples alone, to the last bit, so that a flipped bit in either can be told.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from ... import __version__
from ...errors import HpcmlError
from ..images import is_sample
from . import layout, tar

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SEAL = b'"sha256": "%s"\n}\n'
_SEAL_BYTES = len(_SEAL % bytes(64))
_FIX = "hpcml data verify {} says where it is damaged; then copy it, or pack it, again"


@dataclass(frozen=True)
class Index:
    """n samples in the order of shards and of their places in them.

    Attributes:
        names: relative, with ``/`` between folders, as bytes.
        shards: int32 (n,) numbers of shards; ``offsets``: int64 (n,) of the contents in them; ``sizes``: int64 (n,).
        digests: uint8 (n, 32), SHA-256 of the contents.
        modes: uint16 (n,) 0o644, or 0o755 of an executable.
    """

    names: list[bytes]
    shards: "NDArray[Any]"
    offsets: "NDArray[Any]"
    sizes: "NDArray[Any]"
    digests: "NDArray[Any]"
    modes: "NDArray[Any]"

    def to_bytes(self) -> bytes:
        """Return the file: an uncompressed ``.npz``; the same bytes for the same samples."""
        np = layout.numpy()
        ends = np.cumsum([0, *map(len, self.names)], dtype=np.int64)
        file = io.BytesIO()
        np.savez(
            file, shard=self.shards, offset=self.offsets, size=self.sizes, sha256=self.digests, mode=self.modes,
            names=np.frombuffer(b"".join(self.names), dtype=np.uint8), starts=ends,
        )  # fmt: skip
        return file.getvalue()

    @cached_property
    def order(self) -> "NDArray[Any]":
        """Rows in the order of their names' bytes, int64 (n,)."""
        np = layout.numpy()
        return np.array(sorted(range(len(self.names)), key=self.names.__getitem__), dtype=np.int64)

    @cached_property
    def class_names(self) -> list[bytes]:
        """For each sample the folder of a file that lies in CLASS/FILE, else empty; hidden ones are no classes."""
        return [
            name[:cut] if (cut := name.find(b"/")) > 0 and name.count(b"/") == 1 and name[:1] != b"." else b""
            for name in self.names
        ]

    @property
    def kind(self) -> str:
        """``images`` where all that lies in classes and is not hidden is an image, else ``files``."""
        parts = (
            os_text(name).split("/", 1)[1] for name, label in zip(self.names, self.class_names, strict=True) if label
        )
        inside = [part for part in parts if not part.startswith(".")]
        return "images" if inside and all(map(is_sample, inside)) else "files"


def from_bytes(content: bytes) -> Index:
    """Read an index.

    Raises:
        ValueError: it is none, or its names would lead out of a folder.
    """
    np = layout.numpy()
    try:
        # A pickle in a data file would run code.
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            columns = [file[key] for key in ("shard", "offset", "size", "sha256", "mode")]
            blob, starts = file["names"].tobytes(), file["starts"].tolist()
    except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
        raise ValueError(f"no index: {error}") from None
    names = [blob[first:last] for first, last in pairwise(starts)]
    if any(len(column) != len(names) for column in columns):
        raise ValueError("no index: its columns differ in length")
    for name in names:
        if not _is_inside(name):
            raise ValueError(f"the name {layout.shown(name)!r} would lead out of the folder")
    shards, offsets, sizes, digests, modes = columns
    if digests.shape != (len(names), 32) or any((column < 0).any() for column in (shards, offsets, sizes)):
        raise ValueError("no index: numbers that can't be")
    return Index(names, shards, offsets, sizes, digests, modes)


def _is_inside(name: bytes) -> bool:
    if b"\0" in name or not name:
        return False
    # Few names hold a dot beside a slash, or two slashes.
    if name[0] not in b"/." and b"//" not in name and b"/." not in name and name[-1] != 47:
        return True
    return all(part not in (b"", b".", b"..") for part in name.split(b"/"))


def fingerprint(index: Index, order: "NDArray[Any]") -> str:
    """Return 12 hexadecimal digits for names and contents, in whatever order and shards they are packed.

    Args:
        order: rows in the order of their names' bytes, as ``index.order``.
    """
    digest = hashlib.sha256(b"\0".join(map(index.names.__getitem__, order.tolist())))
    digest.update(b"\0" + index.digests[order].tobytes())
    return digest.hexdigest()[:12]


def describe(
    index: Index,
    index_bytes: bytes,
    shard_bytes: Sequence[int],
    packed: Mapping[str, Any],
    order: "NDArray[Any] | None" = None,
) -> bytes:
    """Return ``dataset.json``.

    Args:
        index_bytes: the file of the index.
        shard_bytes: the size of each shard's file.
        packed: how it was packed.
        order: ``index.order``, where it is known: to sort takes as long as all the rest.
    """
    np = layout.numpy()
    counts = np.bincount(index.shards, minlength=len(shard_bytes)).tolist()
    classes = sorted({os_text(name) for name in set(index.class_names) if name})
    told = {
        "format": layout.FORMAT,
        "kind": index.kind,
        "samples": len(index.names),
        "bytes": int(index.sizes.sum()),
        "classes": classes,
        "fingerprint": fingerprint(index, index.order if order is None else order),
        "packed": {"by": f"hpcml {__version__}", **packed},
        "shards": [
            {"name": layout.shard_name(number), "bytes": size, "samples": counts[number]}
            for number, size in enumerate(shard_bytes)
        ],
        "index": {"name": layout.INDEX, "sha256": hashlib.sha256(index_bytes).hexdigest()},
    }
    return seal(json.dumps(told, indent=1).encode().removesuffix(b"\n}") + b",\n ")


def os_text(name: bytes) -> str:
    """Return a name as text, in the same way on every machine: UTF-8, other bytes as lone surrogates."""
    return name.decode("utf-8", "surrogateescape")


def seal(body: bytes) -> bytes:
    """Return an open JSON object with its last entry: the SHA-256 of all before it."""
    return body + _SEAL % hashlib.sha256(body).hexdigest().encode()


def sealed_body(content: bytes) -> bytes:
    """Return what comes before the last entry."""
    return content[:-_SEAL_BYTES]


def description(path: Path) -> bytes:
    """Return the bytes of ``dataset.json``, unchecked.

    Raises:
        HpcmlError: there is none, so the folder is no packed data set; or it can't be read.
    """
    try:
        return (path / layout.DATASET).read_bytes()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        what = "no packed data set" if missing else f"can't be read: {error.strerror}"
        allowed = f"a folder with a {layout.DATASET}, as hpcml data pack makes it"
        raise HpcmlError(f"{path}: {what}", allowed=allowed) from None


def parsed(content: bytes, path: Path) -> dict[str, Any]:
    """Return the description whose bytes have been checked.

    Raises:
        HpcmlError: it is of another format.
    """
    described: dict[str, Any] = json.loads(content)
    if described["format"] != layout.FORMAT:
        what = f"{path}: format {described['format']}"
        raise HpcmlError(what, allowed=f"format {layout.FORMAT}", fix="it was made by another hpcml: update this one")
    return described


def load(path: Path) -> tuple[dict[str, Any], Index]:
    """Return the description and the index of a packed data set, both checked.

    Raises:
        HpcmlError: it is none, or damaged, or of a later format.
    """
    content, fix = description(path), _FIX.format(path)
    if seal(sealed_body(content)) != content:
        raise HpcmlError(f"{path / layout.DATASET} is damaged: it does not match its checksum", fix=fix)
    described = parsed(content, path)
    try:
        raw = (path / layout.INDEX).read_bytes()
        if hashlib.sha256(raw).hexdigest() != described["index"]["sha256"]:
            raise ValueError("it does not match its checksum")
        return described, from_bytes(raw)
    except OSError as error:
        raise HpcmlError(f"{path / layout.INDEX}: {error.strerror}", fix=fix) from None
    except ValueError as error:
        raise HpcmlError(f"{path / layout.INDEX} is damaged: {error}", fix=fix) from None


def placed(
    names: list[bytes],
    sizes: "NDArray[Any]",
    modes: "NDArray[Any]",
    digests: "NDArray[Any]",
    shards: "NDArray[Any]",
    count: int,
) -> tuple[Index, list[int]]:
    """Return the index of samples that lie one after the other in their shards, and the shards' sizes in bytes.

    Args:
        shards: int32 (n,), never falling; ``count``: of shards, of which some may hold nothing.
    """
    np = layout.numpy()
    heads = tar.header_lengths(names, sizes)
    ends = np.cumsum(heads + tar.padded(sizes))
    last = np.searchsorted(shards, np.arange(count), side="right")  # row after each shard's last one
    shard_ends = np.concatenate([[0], ends])[last]
    begins = np.concatenate([[0], shard_ends[:-1]])
    offsets = ends - tar.padded(sizes) - begins[shards]
    totals = (shard_ends - begins + len(tar.END)).tolist()
    return Index(names, shards, offsets.astype(np.int64), sizes, digests, modes.astype(np.uint16)), totals
