"""What is installed where a run's work runs: packages, and the lock that they were installed from.

Read from the names of the metadata folders on this interpreter's path (PEP 376, "The .dist-info directory"), so that it
takes milliseconds.
"""

import hashlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_METADATA = re.compile(r"(?P<name>[^-]+)-(?P<version>[^-]+)(?:-py\d[\d.]*)?\.(?:dist|egg)-info$")
_PIN = re.compile(r"^(?P<name>[A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?\s*==\s*(?P<version>[^\s;\\,]+)(?P<marker>\s*;)?", re.M)
_LOCKED = re.compile(r'^\[\[packages?\]\]\s*\nname = "(?P<name>[^"]+)"\s*\nversion = "(?P<version>[^"]+)"', re.M)


@dataclass(frozen=True)
class Installed:
    """The environment of this interpreter.

    Attributes:
        python: the interpreter.
        python_version: such as ``3.11.2``.
        packages: installed distribution → version, normalised names (PEP 503).
        lock: SHA-256 of the lock file, else of the sorted ``name==version`` lines of what is installed.
        lock_file: the lock file, relative to the project where it lies in it; empty where none fits what is installed.
    """

    python: str
    python_version: str
    packages: Mapping[str, str]
    lock: str
    lock_file: str


def look(project: Path) -> Installed:
    """Return the environment of this interpreter; never raises for what it can't read.

    Args:
        project: where lock files are looked for, besides the environment itself.
    """
    found = packages()
    lock = lock_of(project, Path(sys.prefix), found)
    digest = hashlib.sha256(lock.read_bytes() if lock else lines(found).encode()).hexdigest() if lock or found else ""
    name = "" if lock is None else str(lock.relative_to(project) if project in lock.parents else lock)
    return Installed(sys.executable, sys.version.split()[0], found, digest, name)


def lines(packages: Mapping[str, str]) -> str:
    """Return packages as a requirements file has them, sorted."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(packages.items()))


def packages() -> dict[str, str]:
    """Return this interpreter's distributions, name → version; the first on its path wins, as for imports."""
    found: dict[str, str] = {}
    for folder in filter(None, sys.path):
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        for name in sorted(names):
            if match := _METADATA.match(name):
                found.setdefault(_normal(match["name"]), match["version"])
    return found


def lock_of(project: Path, prefix: Path, packages: Mapping[str, str]) -> Path | None:
    """Return the lock file that this environment was made from: the largest one that says what is installed.

    A lock fits where no version that it pins is installed in another, and all of its unconditional pins are there.
    """
    places = [prefix / name for name in ("environment.lock", "pylock.toml", "requirements.txt")]
    places += [project / name for name in ("uv.lock", "pylock.toml", "environment.lock", "requirements.txt")]
    best: tuple[int, Path | None] = (0, None)
    for path in (*places, *sorted(project.glob("envs/*/requirements.txt"))):
        try:
            text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        except OSError:
            continue
        agreeing = _agreeing(text, packages)
        if agreeing > best[0]:
            best = (agreeing, path)
    return best[1]


def _agreeing(text: str, packages: Mapping[str, str]) -> int:
    """How many pins of a lock are installed so; 0 where one contradicts what is installed."""
    pins: dict[str, tuple[set[str], bool]] = {}
    lines = "\n".join(line for line in text.split("\n") if line[:1].isalnum())  # most of a lock is hashes
    locked = _LOCKED.finditer(text) if "[[package" in text else ()
    for match in (*_PIN.finditer(lines), *locked):
        versions, needed = pins.setdefault(_normal(match["name"]), (set(), match.re is _PIN and not match["marker"]))
        versions.add(match["version"])
        pins[_normal(match["name"])] = versions, needed and match.re is _PIN and not match["marker"]
    for name, (versions, needed) in pins.items():
        if packages.get(name, None if needed else next(iter(versions))) not in versions:
            return 0
    return sum(name in packages for name in pins)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
