"""The stripe layout of a folder on Lustre, set before large files are written into it."""

import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from ..filesystem import file_system

GIB = 2**30
STRIPE_SIZE = "4M"
# A setting is one request to the metadata server; one that doesn't answer must not hold up the work.
_PATIENCE_S = 30
_said: set[str] = set()


def stripe_count(file_bytes: int) -> int:
    """Return over how many storage targets (OSTs) a file of that size should lie.

    One up to 1 GiB: more would cost a lookup each and gain nothing. Above, four, and from 16 GiB on the square root of
    the size in GiB, as NASA's Lustre best practices advise
    (https://www.nas.nasa.gov/hecc/support/kb/lustre-best-practices_226.html). Lustre takes fewer where it has fewer.
    """
    return 1 if file_bytes <= GIB else max(4, math.ceil(math.sqrt(file_bytes / GIB)))


def is_lustre(path: Path) -> bool:
    """Whether a path lies on Lustre."""
    return file_system(path.resolve()) == "lustre"


def stripe(folder: Path, expected_bytes: int, *, say: Callable[[str], object]) -> None:
    """Set the layout of the files that will be written into a folder; elsewhere than on Lustre do nothing.

    What fails is said and never stops the work: the files are then written in the folder's present layout. It holds for
    files made from now on, so the folder should be empty.

    Args:
        folder: where the files will lie; it exists.
        expected_bytes: of the largest file expected in it, such as one shard; not of all together.
        say: called with each sentence for the person.
    """
    if not is_lustre(folder):
        return
    if not shutil.which("lfs"):
        _once(say, "the stripe layout stays as it is: no lfs on PATH (it comes with the Lustre client)")
        return
    count = stripe_count(expected_bytes)
    words = ["lfs", "setstripe", "-c", str(count), "-S", STRIPE_SIZE, str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        _once(say, f"the stripe layout of {folder} stays as it is: {error}")
        return
    if done.returncode:
        why = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        _once(say, f"the stripe layout of {folder} stays as it is: {why[-1]}")
        return
    say(f"on Lustre: {count} stripe{'s' * (count > 1)} of {STRIPE_SIZE} for files in {folder}")


def _once(say: Callable[[str], object], sentence: str) -> None:
    """Say it once a process: hundreds of folders may be striped."""
    if sentence not in _said:
        _said.add(sentence)
        say(sentence)
