"""The bytes of a POSIX tar archive around its contents: a member's header follows from name, size and mode alone.

So ``verify`` can make every header again and compare. Headers are ustar (POSIX.1-2017, pax, "ustar Interchange
Format"), made for many members at once: ``tarfile`` takes 30 µs for one, this 0.5 µs. A name of more than 100 bytes or a
file of 8 GiB and more takes a pax header before its own; those aren't left to ``tarfile`` because what it fills into
unused fields has changed between versions of Python, and the bytes of a format may not. Owner, group and time are 0.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 512
END = bytes(2 * BLOCK)  # closes an archive
PLAIN, EXECUTABLE = 0o644, 0o755
_NAME = 100  # bytes of the name field
_SIZES = 8**11  # the size field has 11 octal digits
_PADDINGS = tuple(bytes(count) for count in range(BLOCK))
# Columns of the fields that differ from member to member.
_MODE, _SIZE, _SUM = slice(100, 107), slice(124, 135), slice(148, 154)
_FILE, _PAX = b"0", b"x"


def padding(size: int) -> bytes:
    """Return the zeros that fill a member of so many bytes up to whole blocks."""
    return _PADDINGS[-size % BLOCK]


def padded(sizes: Any) -> Any:
    """Return sizes, a number or an array, rounded up to whole blocks."""
    return (sizes + BLOCK - 1) // BLOCK * BLOCK


def header_lengths(names: Sequence[bytes], sizes: "NDArray[Any]") -> "NDArray[Any]":
    """Return the bytes of each member's header, pax header included.

    Args:
        names: n names.
        sizes: int64 (n,) bytes.

    Returns:
        int64 (n,)
    """
    import numpy as np

    lengths: NDArray[Any] = np.full(len(names), BLOCK, dtype=np.int64)
    for row in _long(names, sizes):
        lengths[row] += BLOCK + padded(len(_records(names[row], int(sizes[row]))))
    return lengths


def headers(names: Sequence[bytes], sizes: "NDArray[Any]", modes: "NDArray[Any]") -> list[bytes]:
    """Return the header of each member.

    Args:
        names: n relative names with ``/`` between folders.
        sizes: int64 (n,) bytes.
        modes: (n,) permission bits.
    """
    long = _long(names, sizes)
    block = _block(names, sizes, modes, _FILE)
    made = [block[at : at + BLOCK] for at in range(0, len(block), BLOCK)]
    for row in long:
        made[row] = _pax(names[row], int(sizes[row])) + made[row]
    return made


def _long(names: Sequence[bytes], sizes: "NDArray[Any]") -> list[int]:
    """Rows that the fields of a header can't hold."""
    long = [row for row, name in enumerate(names) if len(name) > _NAME]
    if (sizes >= _SIZES).any():
        long = sorted({*long, *(sizes >= _SIZES).nonzero()[0].tolist()})
    return long


def _block(names: Sequence[bytes], sizes: "NDArray[Any]", modes: "NDArray[Any]", kind: bytes) -> bytes:
    """The headers of n members in one piece, n * 512 bytes; a name is cut to 100 bytes, a size too large is 0."""
    import numpy as np

    one = bytearray(BLOCK)
    one[100:108] = one[108:116] = one[116:124] = b"0000000\0"  # mode, owner, group
    one[136:148] = b"00000000000\0"  # time
    one[148:156] = b"      \0 "  # the checksum
    one[156:157] = kind
    one[257:265] = b"ustar\x0000"
    one[329:337] = one[337:345] = b"0000000\0"  # device numbers
    many: NDArray[Any] = np.empty((len(names), BLOCK), dtype=np.uint8)
    many[:] = np.frombuffer(one, dtype=np.uint8)
    many[:, :_NAME] = np.array(names, dtype=f"S{_NAME}").view(np.uint8).reshape(len(names), _NAME)
    many[:, _MODE] = _octal(modes, 7)
    many[:, _SIZE] = _octal(np.where(sizes < _SIZES, sizes, 0), 11)
    # Of all bytes, those of the checksum taken for eight spaces; the one that is 0 here lacks a space.
    many[:, _SUM] = _octal(many.sum(axis=1, dtype=np.int64) + ord(" "), 6)
    content: bytes = many.tobytes()
    return content


def _octal(numbers: "NDArray[Any]", digits: int) -> "NDArray[Any]":
    """The octal digits of each number as ASCII, uint8 (n, digits)."""
    import numpy as np

    shifts: NDArray[Any] = np.arange(3 * (digits - 1), -1, -3, dtype=np.int64)
    return ((numbers.astype(np.int64)[:, None] >> shifts) & 7).astype(np.uint8) + np.uint8(ord("0"))


def _pax(name: bytes, size: int) -> bytes:
    import numpy as np

    records = _records(name, size)
    own = _block([b"././@PaxHeader"], np.array([len(records)]), np.array([PLAIN]), _PAX)
    return own + records + padding(len(records))


def _records(name: bytes, size: int) -> bytes:
    """What a pax header says of a member."""
    records = b""
    if len(name) > _NAME:
        try:
            name.decode()
        except UnicodeDecodeError:
            records += _record(b"hdrcharset", b"BINARY")
        records += _record(b"path", name)
    if size >= _SIZES:
        records += _record(b"size", b"%d" % size)
    return records


def _record(key: bytes, value: bytes) -> bytes:
    """One record: its own length in decimal, a space, key=value, a newline."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    while len(str(length)) + rest != length:
        length = len(str(length)) + rest
    return b"%d %s=%s\n" % (length, key, value)
