"""Whatever a folder holds: unpack(pack(x)) is x, tar gives the same, and each byte of the result is guarded."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcml.data.shards import Shards, layout, pack, tar, unpack, verify

# A part of a name is 255 bytes at most, of any but / and NUL.
PARTS = st.one_of(
    st.sampled_from([b"a", b"A", b"b", b"class", b"\xc3\xa9", b"-", b" ", b"\n", b"x.jpg.txt"]),
    st.binary(min_size=1, max_size=255).map(lambda raw: raw.replace(b"/", b"_").replace(b"\0", b"0")),
).filter(lambda part: part not in (b".", b".."))
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(b"/".join).filter(lambda name: len(name) < 900)
SIZES = st.one_of(st.sampled_from([0, 1, 511, 512, 513, 1024]), st.integers(0, 5000))
FILES = st.dictionaries(NAMES, st.tuples(SIZES, st.integers(0, 255), st.booleans()), min_size=1, max_size=25)


def is_an_image(name: bytes) -> bool:
    return name.lower().endswith((b".jpg", b".jpeg", b".png"))


def without_clashes(files: dict[bytes, tuple[int, int, bool]]) -> dict[bytes, tuple[bytes, bool]]:
    """Drop what can't be in one folder together, a file and what is below it, and images that are none."""
    kept: dict[bytes, tuple[bytes, bool]] = {}
    folders: set[bytes] = set()
    for name, (size, byte, executable) in sorted(files.items()):
        parts = name.split(b"/")
        above = {b"/".join(parts[:count]) for count in range(1, len(parts))}
        if not (above & kept.keys() or name in folders or is_an_image(name)):
            kept[name] = bytes([byte]) * size, executable
            folders |= above
    return kept


def written(folder: bytes, files: dict[bytes, tuple[bytes, bool]]) -> None:
    for name, (content, executable) in files.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
        os.chmod(path, 0o755 if executable else 0o644)


def found(folder: Path) -> dict[bytes, tuple[bytes, bool]]:
    top = os.fsencode(folder)
    files = {}
    for parent, _, names in os.walk(top):
        for name in names:
            path = os.path.join(parent, name)
            with open(path, "rb") as file:
                files[os.path.relpath(path, top)] = file.read(), bool(os.stat(path).st_mode & 0o100)
    return files


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(FILES, st.integers(1, 3), st.sampled_from([1, 2000, 10**6]))
def test_unpacking_gives_back_what_was_packed(
    files: dict[bytes, tuple[int, int, bool]], count: int, shard_bytes: int
) -> None:
    wanted = without_clashes(files)
    if not wanted:
        return
    place = Path(tempfile.mkdtemp(prefix="hpcml-pack-"))
    try:
        written(os.fsencode(place / "source"), wanted)
        made = pack(place / "source", place / "packed", shard_bytes=shard_bytes, workers=count)
        assert (made.samples, made.bytes) == (len(wanted), sum(len(content) for content, _ in wanted.values()))
        assert verify(made.path, workers=1) == []
        unpack(made.path, place / "back", workers=count)
        assert found(place / "back") == wanted
        shards = Shards(made.path)
        contents = dict(zip(map(os.fsencode, shards.names), shards.read(range(len(shards))), strict=True))
        assert contents == {name: content for name, (content, _) in wanted.items()}
        assert by_tarfile(made.path) == wanted
    finally:
        shutil.rmtree(place)


def by_tarfile(packed: Path) -> dict[bytes, tuple[bytes, bool]]:
    files = {}
    for path in packed.glob("shard-*.tar"):
        with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as archive:
            for member in archive:
                content = archive.extractfile(member)
                assert content is not None
                name = member.name.encode("utf-8", "surrogateescape")
                files[name] = content.read(), bool(member.mode & 0o100)
    return files


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(NAMES, st.integers(0, 2**40), st.booleans()), min_size=1, max_size=5))
def test_headers_say_what_they_are_given(members: list[tuple[bytes, int, bool]]) -> None:
    np = layout.numpy()
    names = [name for name, _, _ in members]
    sizes = np.array([size for _, size, _ in members], dtype=np.int64)
    modes = np.array([0o755 if executable else 0o644 for _, _, executable in members])
    made = tar.headers(names, sizes, modes)
    assert [len(header) for header in made] == tar.header_lengths(names, sizes).tolist()
    for (name, size, executable), header in zip(members, made, strict=True):
        with tarfile.open(fileobj=io.BytesIO(header), encoding="utf-8", errors="surrogateescape") as archive:
            member = archive.next()
        assert member is not None
        assert member.name.encode("utf-8", "surrogateescape") == name
        assert (member.size, member.mode) == (size, 0o755 if executable else 0o644)
