"""What kind of file system holds a path; sizes as people read them."""

import contextlib
from pathlib import Path

# SQLite's locks are not safe on these, and each file that is opened costs a trip to a metadata server.
PARALLEL = ("lustre", "gpfs", "beegfs")
# Shared by nodes, so not a node's own disk.
NETWORK = (*PARALLEL, "nfs", "nfs4", "cifs", "ceph", "fuse.sshfs", "wekafs", "9p")


def file_system(path: Path) -> str:
    """Return the type of the file system that holds a path, from /proc/self/mounts; ``unknown`` where that can't be told."""
    best, kind = "", "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, mount, name, *_ = line.split()
            inside = mount == "/" or path == Path(mount) or Path(mount) in path.parents
            if inside and len(mount) >= len(best):
                best, kind = mount, name
    return kind


def size_words(size: float) -> str:
    """Return a number of bytes as a person reads it, in binary units with two or three digits."""
    unit = 0
    while size >= 1000 and unit < 4:
        size, unit = size / 1024, unit + 1
    return f"{size:.{0 if size >= 10 or not unit else 1}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
