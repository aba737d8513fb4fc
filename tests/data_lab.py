"""What tests of data versions share: a real S3 server, a project with digits in it, and commands typed there."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

# Of this process alone, so that it is known where they come from. rclone takes none that are shorter.
KEY, SECRET = f"KEY{secrets.token_hex(9)[:17]}".upper(), secrets.token_hex(10)
BUCKET = "bench"
READY_S = 30
LIMIT_S = 120
FOREIGN = ("AWS_", "DVC_", "GIT_", "SLURM_", "HPCML_", "MLFLOW_")


def need_dvc() -> None:
    """Skip where DVC or the S3 server isn't installed."""
    beside = Path(sys.executable).parent
    missing = [name for name in ("dvc", "rclone") if not (beside / name).exists()]
    if missing:
        pytest.skip(f"{' and '.join(missing)}: not installed; scripts/setup --test", allow_module_level=True)


class S3:
    """rclone serving a folder as S3, on the loopback: its folders are the buckets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / BUCKET).mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers, if only to refuse."""
        rclone = str(Path(sys.executable).with_name("rclone"))
        words = [rclone, "serve", "s3", str(self.folder), "--addr", f"127.0.0.1:{self.port}"]
        with self.folder.with_suffix(".log").open("ab") as log:
            self.child = subprocess.Popen([*words, "--auth-key", f"{KEY},{SECRET}"], stdout=log, stderr=log)
        deadline = time.monotonic() + READY_S
        while True:
            try:
                urllib.request.urlopen(self.uri, timeout=5).close()
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                assert self.child.poll() is None and time.monotonic() < deadline, self.folder.with_suffix(
                    ".log"
                ).read_text()
                time.sleep(0.02)

    def stop(self) -> None:
        """End it."""
        self.child.kill()
        self.child.wait(30)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[S3]:
    """Yield a server meanwhile."""
    server = S3(folder)
    try:
        yield server
    finally:
        server.stop()


@dataclass
class Typed:
    """What a command gave: exit code and both outputs."""

    code: int
    out: str
    err: str


@dataclass
class Lab:
    """A person's account: a home without configuration, a data folder, and the projects in it."""

    home: Path
    more: Mapping[str, str] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    @property
    def data(self) -> Path:
        """The data folder."""
        return self.home / "data"

    @property
    def env(self) -> dict[str, str]:
        """The environment: this one's, with nothing in it that is about data or Git."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        own = {"HOME": str(self.home), "XDG_CONFIG_HOME": str(self.home / ".config"), "HPCML_DATA": str(self.data)}
        own |= {"AWS_EC2_METADATA_DISABLED": "true", "HPCML_SITE": "local", "GIT_CONFIG_NOSYSTEM": "1"}
        return {**kept, **own, **self.more}

    def command(self, *words: str | Path) -> list[str]:
        """hpcml, as this Python has it."""
        return [sys.executable, "-m", "hpcml", *map(str, words)]

    def hpcml(self, where: Path, *words: str | Path, given: str | None = None, **env: str) -> Typed:
        """Type a command of hpcml in a folder."""
        return self.run(where, *self.command(*words), given=given, **env)

    def version(self, where: Path, *words: str | Path, given: str | None = None, code: int = 0, **env: str) -> Typed:
        """Type ``hpcml data version …``; its exit code must be as given."""
        typed = self.hpcml(where, "data", "version", *words, given=given, **env)
        assert typed.code == code, f"{words}: {typed}"
        assert "Traceback" not in typed.err and "internal error" not in typed.err, typed.err
        return typed

    def git(self, where: Path, *words: str | Path) -> str:
        """Type a command of git in a folder; it must succeed."""
        typed = self.run(where, "git", *map(str, words))
        assert typed.code == 0, f"{words}: {typed}"
        return typed.out

    def run(self, where: Path, *words: str, given: str | None = None, **env: str) -> Typed:
        """Run a program in a folder."""
        done = subprocess.run(
            words, cwd=where, env={**self.env, **env}, input=given, stdin=None if given is not None else subprocess.DEVNULL,
            capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        self.said += [done.stdout, done.stderr]
        return Typed(done.returncode, done.stdout, done.stderr)

    def project(self, name: str) -> Path:
        """Make a repository with a line of code in it."""
        path = self.home / name
        path.mkdir()
        self.git(path, "init", "--quiet")
        (path / "train.py").write_text("print('training')\n")
        self.git(path, "add", ".")
        self.git(path, "commit", "--quiet", "-m", "code")
        return path


def lab(home: Path) -> Lab:
    """Make an account with a name that git takes."""
    home.mkdir(parents=True, exist_ok=True)
    (home / ".gitconfig").write_text(
        "[user]\n  name = A Person\n  email = person@example.org\n[init]\n  defaultBranch = main\n"
    )
    return Lab(home)


def png(values: bytes, width: int = 4) -> bytes:
    """A grey picture."""
    rows = b"".join(b"\0" + values[at : at + width] for at in range(0, len(values), width))
    head = struct.pack(">IIBBBBB", width, len(values) // width, 8, 0, 0, 0, 0)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def fill(folder: Path, count: int, seed: int = 0) -> Path:
    """Fill ``folder/0…9`` with so many pictures each, no two alike."""
    for label in range(10):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            values = struct.pack(">IIII", label, number, seed, 0)
            (folder / str(label) / f"{seed}-{number}.png").write_bytes(png(values))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, but for hidden ones."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def merge(source: Path, into: Path) -> None:
    """Copy all files of a folder into another, as ``cp -r SOURCE/. INTO``."""
    shutil.copytree(source, into, dirs_exist_ok=True)


def end(child: subprocess.Popen[str]) -> None:
    """Kill a process that a test has started, and its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait(30)
