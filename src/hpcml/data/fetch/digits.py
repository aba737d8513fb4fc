"""MNIST's own file format (idx), and digits as a folder of images."""

import math
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import HpcmlError
from .kinds import BROKEN, plain

if TYPE_CHECKING:
    from numpy.typing import NDArray

# http://yann.lecun.com/exdb/mnist/: two zero bytes, the type, the number of dimensions, their sizes, then the values,
# all with the highest byte first.
_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_PNG = b"\x89PNG\r\n\x1a\n"


def read_idx(path: Path, origin: str) -> "NDArray[Any]":
    """Return the array of an idx file, which may be compressed, in this machine's byte order.

    Raises:
        HpcmlError: it is none, or cut off, or longer than it says.
    """
    import numpy as np

    with path.open("rb") as file:
        head = file.read(6)
    try:
        with plain(path, head) as file:
            content = file.read()
    except (*BROKEN, OSError) as error:
        raise HpcmlError(f"cannot be read: {error}", origin=origin, fix="fetch it again") from None
    dims = content[3] if len(content) >= 4 and content[:2] == b"\0\0" and content[2] in _TYPES else 0
    if not dims or len(content) < 4 + 4 * dims:
        raise HpcmlError("no idx file", origin=origin, allowed="MNIST's format: train-images-idx3-ubyte and the like")
    shape = struct.unpack(f">{dims}I", content[4 : 4 + 4 * dims])
    dtype = np.dtype(_TYPES[content[2]])
    wanted = 4 + 4 * dims + math.prod(shape) * dtype.itemsize
    if len(content) != wanted:
        what = f"{len(content):,} bytes, and its head announces {wanted:,}"
        raise HpcmlError(what, origin=origin, fix="fetch it again: it is cut off or damaged")
    values = np.frombuffer(content, dtype, offset=4 + 4 * dims).reshape(shape)
    return values.astype(dtype.newbyteorder("="))


def png(image: "NDArray[Any]") -> bytes:
    """Return a grey image, uint8 (height, width), as a PNG file: the same bytes everywhere.

    Not compressed: what zlib makes differs between its versions, and a digit of 784 bytes has little to gain.
    """
    height, width = image.shape
    raw = b"".join(b"\0" + row.tobytes() for row in image)  # each row begins with its filter, 0: none
    stored = b"".join(
        struct.pack("<BHH", index + 65535 >= len(raw), len(part), len(part) ^ 0xFFFF) + part
        for index in range(0, len(raw), 65535)
        for part in (raw[index : index + 65535],)
    )
    data = b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(raw))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits, grey
    return _PNG + _chunk(b"IHDR", head) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def write_images(
    images: "NDArray[Any]", labels: "NDArray[Any]", into: Path, progress: Callable[[int], object] = lambda done: None
) -> int:
    """Write grey images as ``INTO/LABEL/ROW.png``; returns how many.

    Args:
        images: uint8 (n, height, width).
        labels: whole numbers (n,); each gets a folder.
        into: where to; it is made.
        progress: called with the number of images written, now and then.
    """
    digits = len(str(max(len(images) - 1, 1)))
    folders = {int(label): into / str(int(label)) for label in set(labels.tolist())}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    for row, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        (folders[label] / f"{row:0{digits}}.png").write_bytes(png(image))
        if row % 500 == 0:
            progress(row)
    return len(images)


def write_npz(parts: "Sequence[NDArray[Any]]", path: Path) -> None:
    """Write x_train, y_train, x_test, y_test as an ``.npz`` that ``hpcml.data.load`` reads; the same bytes each time."""
    import numpy as np

    with path.open("wb") as file:
        np.savez(file, **dict(zip(("x_train", "y_train", "x_test", "y_test"), parts, strict=True)))
