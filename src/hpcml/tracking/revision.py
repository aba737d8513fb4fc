"""What git knows of a project: revision, branch, uncommitted edits as a patch. Standard library only.

The snapshot in the run directory is what ran; revision and patch say it in git's terms, so that it is found again in
another clone: ``git checkout REVISION && git apply code.patch``.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# A patch is uploaded with every run; what is larger than this is data rather than an edit.
LARGEST_PATCH = 2**20
# A cold network file system needs seconds for the status of a large work tree; a run must not wait for more.
PATIENCE_S = 10.0
# The person's own configuration stays; whatever else GIT_* says (GIT_DIR in a hook, tracing) is about another call.
_KEPT = (
    "GIT_CONFIG_GLOBAL",
    "GIT_CONFIG_SYSTEM",
    "GIT_CONFIG_NOSYSTEM",
    "GIT_CEILING_DIRECTORIES",
    "GIT_DISCOVERY_ACROSS_FILESYSTEM",
    "GIT_EXEC_PATH",
)
# A patch that reads the same whatever diff.* is configured.
_DIFF = (
    *("diff", "--binary", "--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "--no-relative"),
    *("--src-prefix=a/", "--dst-prefix=b/", "--submodule=short", "HEAD"),
)
# Untracked files that may hold secrets: the snapshot has them, MLflow does not get them.
_PRIVATE = re.compile(r"(^|/)\.|secret|credential|password|token|\.pem$|\.key$|(^|/)id_[a-z0-9]+$", re.IGNORECASE)


@dataclass(frozen=True)
class Revision:
    """The state of a project's checkout.

    Attributes:
        revision: the commit's full id; empty where there is none yet.
        branch: empty where HEAD is detached.
        dirty: whether tracked files differ from the commit, or untracked ones lie beside them.
        remote: address of ``origin``, else of the first remote, without credentials.
        patch: the uncommitted edits, for ``git apply``; at most ``LARGEST_PATCH`` bytes.
        left_out: files with edits that the patch has not, and why not.
        note: why nothing is known; empty where something is.
    """

    revision: str = ""
    branch: str = ""
    dirty: bool = False
    remote: str = ""
    patch: bytes = field(default=b"", repr=False)
    left_out: tuple[str, ...] = ()
    note: str = ""


def look(project: Path) -> Revision:
    """Return what git knows of a project; never raises for what git says. Untouched: the index, and all files."""
    return ask(project)()


def ask(project: Path) -> Callable[[], Revision]:
    """Put the questions of ``look`` to git; it works on them until the function that this returns is called."""
    if not shutil.which("git"):
        return lambda: Revision(note="git is not installed")
    top = next((path for path in (project, *project.parents) if (path / ".git").exists()), None)
    if top is None:
        return lambda: Revision(note="not a git checkout")
    git = _Git(project, top)
    status = git.start("status", "--porcelain=v2", "--branch", "-z", "--untracked-files=all", "--", ".")
    tracked = git.start("ls-files", "--error-unmatch", "--", ".")
    remotes = git.start("config", "--get-regexp", r"^remote\..*\.url$")
    return lambda: _answered(git, top, status, tracked, remotes)


def _answered(git: "_Git", top: Path, status: "_Asked", tracked: "_Asked", remotes: "_Asked") -> Revision:
    code, listed = git.answer(status)
    _, any_tracked = git.answer(tracked, most=1)
    _, urls = git.answer(remotes)
    if code != 0:
        return Revision(note=git.problem or "git refuses the checkout")
    seen = _parse(listed)
    if not any_tracked and not (seen.added or seen.changed):
        return Revision(note=f"git at {top} tracks nothing of the project")
    patch, left_out = _patch(git, top, seen) if seen.revision else (b"", ("all files: nothing is committed yet",))
    dirty = bool(seen.changed or seen.untracked)
    return Revision(seen.revision, seen.branch, dirty, _remote(os.fsdecode(urls)), patch, left_out)


_Asked = subprocess.Popen[bytes]


@dataclass(frozen=True)
class _Status:
    revision: str
    branch: str
    changed: tuple[str, ...]
    untracked: tuple[str, ...]
    added: bool


class _Git:
    """git for one project, as the person's own configuration has it and within one deadline."""

    def __init__(self, project: Path, top: Path) -> None:
        self.project, self.deadline, self.problem = project, time.monotonic() + PATIENCE_S, ""
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k in _KEPT}
        self.environment |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
        # A watcher is a command of the repository's; a status needs none.
        self.settings = ["-c", "core.fsmonitor=false"]
        if top.stat().st_uid == project.stat().st_uid:
            # Root, or a colleague, in a project of somebody else: the code is about to run anyway. A repository above
            # the project that belongs to a third person stays refused, as git means it.
            self.settings += ["-c", f"safe.directory={top.resolve()}"]

    def start(self, *words: str, index: str | None = None) -> "_Asked":
        environment = self.environment | ({"GIT_INDEX_FILE": index} if index else {})
        command = ["git", "-C", str(self.project), *self.settings, *words]
        pipe, none = subprocess.PIPE, subprocess.DEVNULL
        return subprocess.Popen(command, env=environment, stdin=none, stdout=pipe, stderr=none)

    def answer(self, process: "_Asked", most: int | None = None) -> tuple[int | None, bytes]:
        """Return exit code and output; the code is None where it took too long, or said more than ``most`` bytes."""
        import threading

        timer = threading.Timer(max(0.01, self.deadline - time.monotonic()), process.kill)
        timer.start()
        assert process.stdout is not None
        try:
            output = process.stdout.read() if most is None else process.stdout.read(most + 1)
            if most is not None and len(output) > most:
                process.kill()
                process.wait()
                return None, output
            code = process.wait()
        finally:
            timer.cancel()
            process.stdout.close()
        if time.monotonic() > self.deadline:
            self.problem = f"git gave no answer in {PATIENCE_S:g} s"
            return None, output
        return code, output


def _parse(listed: bytes) -> _Status:
    """Read ``git status --porcelain=v2 -z`` (git-status(1), "Porcelain Format Version 2")."""
    revision, branch, added = "", "", False
    changed, untracked = list[str](), list[str]()
    entries = iter(os.fsdecode(listed).split("\0"))
    for entry in entries:
        kind, _, rest = entry.partition(" ")
        if kind == "#":
            name, _, value = rest.partition(" ")
            revision = value if name == "branch.oid" and value != "(initial)" else revision
            branch = value if name == "branch.head" and value != "(detached)" else branch
        elif kind == "1":
            changed.append(rest.split(" ", 7)[7])
            added = added or rest.startswith("A")
        elif kind == "2":
            changed.append(rest.split(" ", 8)[8])
            next(entries)  # the path it was renamed from
        elif kind == "u":
            changed.append(rest.split(" ", 9)[9])
        elif kind == "?":
            untracked.append(rest)
    return _Status(revision, branch, tuple(changed), tuple(untracked), added)


def _patch(git: _Git, top: Path, seen: _Status) -> tuple[bytes, tuple[str, ...]]:
    """Return the edits of tracked files, and of untracked ones that are small and not private, file by file."""
    left_out = list[str]()

    def size(name: str) -> int:
        path = top / name
        return path.lstat().st_size if os.path.lexists(path) and not path.is_dir() else 0

    large = [name for name in (*seen.changed, *seen.untracked) if size(name) > LARGEST_PATCH]
    left_out += [f"{name}: {size(name)} bytes" for name in large]
    new = [name for name in seen.untracked if name not in large and not name.endswith("/")]
    left_out += [f"{name}: untracked, may be private" for name in new if _PRIVATE.search(name)]
    left_out += [f"{name}: a checkout of its own" for name in seen.untracked if name.endswith("/")]
    new = [name for name in new if not _PRIVATE.search(name)]
    if not new and not seen.changed:
        return b"", tuple(left_out)
    import tempfile  # these milliseconds are spent only where there are edits

    within = [":/" if top == git.project else ".", *(f":(top,exclude,literal){name}" for name in large)]
    with tempfile.TemporaryDirectory(prefix="hpcml-") as scratch:
        index = _index_with(git, new, Path(scratch)) if new else None
        if new and index is None:
            left_out += [f"{name}: untracked, and the index can't be read" for name in new]
        code, text = git.answer(git.start(*_DIFF, "--", *within, index=index), most=LARGEST_PATCH)
    if code is None:  # whole files only, so that it still applies
        text = text[: max(text.rfind(b"\ndiff --git ") + 1, 0)]
        left_out.append(f"the files after these: the patch is over {LARGEST_PATCH} bytes, or git was slow")
    return text, tuple(left_out)


def _index_with(git: _Git, new: list[str], scratch: Path) -> str | None:
    """Copy the index and enter untracked files in the copy, without content: a diff then shows them as new."""
    code, place = git.answer(git.start("rev-parse", "--git-path", "index"))
    if code != 0:
        return None
    copy, names = scratch / "index", scratch / "names"
    source = Path(git.project, os.fsdecode(place).rstrip("\n"))
    try:
        if source.exists():
            shutil.copyfile(source, copy)
        names.write_bytes(b"\0".join(b":(top,literal)" + os.fsencode(name) for name in new))
    except OSError:
        return None
    options = ("--intent-to-add", f"--pathspec-from-file={names}", "--pathspec-file-nul")
    code, _ = git.answer(git.start("add", *options, index=str(copy)))
    return str(copy) if code == 0 else None


def _remote(listed: str) -> str:
    """Return the address of origin, else of the first remote."""
    urls = dict(line.split(" ", 1) for line in listed.splitlines() if " " in line)
    return without_credentials(urls.get("remote.origin.url") or next(iter(urls.values()), ""))


def without_credentials(url: str) -> str:
    """Return a remote's address without password, token or query; the user of an ssh address is no secret."""
    from urllib.parse import urlsplit, urlunsplit

    if "://" not in url:
        return url  # host:path, or a folder
    try:
        parts = urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        keep = f"{user.partition(':')[0]}@" if user and parts.scheme.endswith("ssh") else ""
        return urlunsplit(parts._replace(netloc=keep + host, query="", fragment=""))
    except ValueError:
        return ""
