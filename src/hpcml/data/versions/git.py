"""Git as versions of data use it: pointers read from tags, one commit and one tag made. Nothing else is touched."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ...errors import HpcmlError

# A cold network file system needs seconds for a large work tree; git waits for no network here.
PATIENCE_S = 120
# Of another call of git, such as the hook that this may run in (git(1), "The Git Repository").
_FOREIGN = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")


@dataclass(frozen=True)
class Answer:
    """What git said: its exit code and both outputs."""

    code: int
    out: str
    error: str


@dataclass(frozen=True)
class Git:
    """The repository that holds a folder.

    Attributes:
        top: its work tree.
        prefix: the folder that was asked about, relative to ``top`` and ending in ``/``; empty for ``top`` itself.
    """

    top: Path
    prefix: str = ""

    def ask(self, *words: str) -> Answer:
        """Run git at the top; a code other than 0 is the caller's to judge."""
        return ask(self.top, *words)

    def need(self, *words: str, doing: str) -> str:
        """Run git at the top and return what it printed.

        Raises:
            HpcmlError: git refuses; its own words say why.
        """
        answer = self.ask(*words)
        if answer.code:
            raise refused(doing, answer)
        return answer.out

    def commit_of(self, tag: str) -> str | None:
        """Return the commit that a tag names, None where there is no such tag."""
        answer = self.ask("rev-parse", "--verify", "--quiet", f"refs/tags/{tag}^{{commit}}")
        return answer.out.strip() or None

    def tags(self) -> list[str]:
        """Return all tags, the oldest first."""
        return self.need("for-each-ref", "--sort=creatordate", "--format=%(refname:strip=2)", "refs/tags",
                         doing="list its tags").split("\n")[:-1]  # fmt: skip


def ask(folder: Path, *words: str) -> Answer:
    """Run git in a folder.

    Raises:
        HpcmlError: git is not installed, or gives no answer.
    """
    own = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    own |= {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            ["git", *words], cwd=folder, env=own, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S,
            check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise HpcmlError("git is not on PATH, and versions of data are its tags", fix="install git") from None
    except subprocess.TimeoutExpired:
        what = f"git {words[0]} gives no answer in {PATIENCE_S} s"
        raise HpcmlError(what, origin=str(folder), fix="see what git status says there") from None
    return Answer(done.returncode, os.fsdecode(done.stdout), done.stderr.decode(errors="replace"))


def find(folder: Path) -> Git:
    """Return the repository that holds a folder.

    Raises:
        HpcmlError: there is none.
    """
    start = next((place for place in (folder, *folder.parents) if place.is_dir()), folder)
    answer = ask(start, "rev-parse", "--show-toplevel", "--show-prefix")
    if answer.code:
        if "not a git repository" not in answer.error:  # such as "dubious ownership"
            raise refused(f"look at {start}", answer)
        what = f"{start} is in no git repository, and versions of data are tags of one"
        raise HpcmlError(what, fix="git init, in the project's folder")
    top, prefix = answer.out.split("\n")[:2]
    if not top:
        raise HpcmlError(f"{start} is in a git repository without a work tree", fix="work in a clone of it")
    return Git(Path(top), prefix)


def refused(doing: str, answer: Answer) -> HpcmlError:
    """Return what to tell of a git that would not."""
    said = [line.strip() for line in answer.error.splitlines() if line.strip()]
    words = next((line for line in said if line.startswith(("fatal: ", "error: "))), said[0] if said else "no reason")
    if "Please tell me who you are" in answer.error or "empty ident name" in answer.error:
        words = "it does not know who you are"
        fix = 'git config --global user.name "…"; git config --global user.email …; then again'
    elif ".lock': File exists" in answer.error:
        fix = "another git is at work there; if none is, remove that .lock file, then again"
    else:
        fix = "mend what it says, then again"
    return HpcmlError(f"git can't {doing}: {words.removeprefix('fatal: ').removeprefix('error: ')}", fix=fix)
