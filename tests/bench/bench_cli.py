"""What a person waits for at the prompt: ``hpcml --version`` and ``hpcml submit`` against the least that they can cost.

    scripts/bench cli [--quick]

``--version`` is compared with a Python that does nothing. ``submit`` is compared with a bare ``sbatch`` of the very
script that it submits, and a Python that does nothing; it runs on a Slurm of this machine (scripts/devcluster), takes
the snapshot of this project, and its job is held in the queue, so that nothing else computes while the clock runs.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import pairs

PROJECT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
HPCML = str(Path(sys.executable).with_name("hpcml"))
PAIRS = 20
VERSION_BOUND = pairs.Bound(4.0, at_least=False, pairs=PAIRS)
VERSION_AIM = 2.5
SUBMIT_BOUND = pairs.Bound(8.0, at_least=False, pairs=PAIRS)
# Slow to import, and of no use before the work starts: the first takes 4 s, the next three 1 to 2 s each.
HEAVY = (
    *("tensorflow", "torch", "mlflow", "papermill", "pandas", "numpy", "keras", "tf_keras", "jax", "horovod"),
    *("scipy", "sklearn", "matplotlib", "mlxtend", "nbclient", "nbformat", "jupyter_client", "IPython", "pydantic"),
)
JOB = """\
name = "bench"
command = ["true"]
[resources]
time = "00:01:00"
[slurm]
extra = ["--hold"]
"""


@dataclass(frozen=True)
class Cluster:
    """A Slurm for one benchmark: the environment of its users, the job file, the script that ``submit`` makes of it."""

    environment: dict[str, str]
    runs: Path
    job: Path
    script: Path

    def submit(self) -> float:
        """Return the seconds of one ``hpcml submit``."""
        seconds, _ = timed([HPCML, "submit", str(self.job)], self.environment)
        self._clear()
        return seconds

    def bare(self) -> float:
        """Return the seconds of one ``sbatch`` and one Python that does nothing."""
        queued, _ = timed(["sbatch", "--parsable", str(self.script)], self.environment)
        idle, _ = timed([PYTHON, "-c", "pass"], self.environment)
        self._clear()
        return queued + idle

    def _clear(self) -> None:
        """Take the job out of the queue and its run directory off the disk, outside the clock."""
        subprocess.run(["scancel", "--user", "root"], env=self.environment, check=True, timeout=30)
        shutil.rmtree(self.runs, ignore_errors=True)


def timed(words: Sequence[str], environment: dict[str, str]) -> tuple[float, str]:
    """Run a command in the project and return its wall time in seconds and what it printed.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    began = time.perf_counter()
    done = subprocess.run(words, env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return seconds, done.stdout


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A Slurm of its own, gone at the end with everything in it."""
    name = f"bench{os.getpid()}"
    folder = Path(tempfile.mkdtemp(prefix="hpcml-bench-"))  # short: a unix socket's path ends after 107 bytes
    plain = pairs.environment() | {"HPCML_DEVCLUSTER": str(folder / "slurm")}
    devcluster = str(PROJECT / "scripts" / "devcluster")
    try:
        timed([devcluster, "up", "--name", name], plain)
        own = {
            "SLURM_CONF": str(folder / "slurm" / name / "slurm.conf"),
            "HPCML_RUNS": str(folder / "runs"),
            "HPCML_PROJECT": str(PROJECT),
            "HPCML_PYTHON": PYTHON,
        }
        job, script = folder / "bench.toml", folder / "bench.sbatch"
        job.write_text(JOB, encoding="utf-8")
        ready = Cluster(pairs.environment() | own, folder / "runs", job, script)
        script.write_text(timed([HPCML, "submit", "--dry-run", str(job)], ready.environment)[1], encoding="utf-8")
        yield ready
    finally:
        subprocess.run([devcluster, "down", "--all"], env=plain, stdout=subprocess.DEVNULL, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def imports(words: Sequence[str], environment: dict[str, str]) -> str:
    """Return a line on what a command of hpcml imports: how much, whether anything heavy, and what took longest."""
    done = subprocess.run(
        [PYTHON, "-X", "importtime", HPCML, *words],
        env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    spent: dict[str, int] = {}  # module → µs, without what it imports in turn
    for line in done.stderr.splitlines():
        columns = line.removeprefix("import time:").split("|")
        if len(columns) == 3 and columns[0].strip().isdecimal():
            spent[columns[2].strip()] = int(columns[0])
    heavy = [name for name in HEAVY if name in spent]
    slowest = sorted(spent, key=lambda name: spent[name], reverse=True)[:5]
    times = ", ".join(f"{name} {spent[name] / 1000:.1f}" for name in slowest)
    told = f"imports {', '.join(heavy)}, which is heavy" if heavy else "no framework"
    return f"hpcml {words[0]}: {len(spent)} modules, {told}; slowest by themselves, ms: {times}"


def version_figure(count: int) -> pairs.Figure:
    """Measure ``hpcml --version``."""
    environment = pairs.environment()
    both = pairs.in_turn(
        lambda: timed([HPCML, "--version"], environment)[0], lambda: timed([PYTHON, "-c", "pass"], environment)[0]
    )
    both(True)  # the first run compiles to .pyc and fills the file cache
    measured = list(pairs.measure(both, least=count))
    what = f"`hpcml --version` against `python -c pass`; aim {VERSION_AIM:g}."
    return pairs.Figure("version", what, ("hpcml", "python"), "s", measured, VERSION_BOUND)


def submit_figure(ready: Cluster, count: int) -> pairs.Figure:
    """Measure ``hpcml submit``."""
    timed([HPCML, "submit", str(ready.job)], ready.environment)
    (archive,) = ready.runs.glob("*/code.tar")
    with tarfile.open(archive) as packed:
        files = packed.getmembers()
    size = sum(file.size for file in files) / 2**20
    ready.bare()
    measured = list(pairs.measure(pairs.in_turn(ready.submit, ready.bare), least=count))
    what = (
        f"`hpcml submit` of a held job, snapshot of {len(files)} files ({size:.1f} MiB) included, "
        "against `sbatch` of the same script and `python -c pass`."
    )
    return pairs.Figure("submit", what, ("hpcml", "sbatch + python"), "s", measured, SUBMIT_BOUND)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two pairs, nothing is judged")
    count = 2 if parser.parse_args().quick else PAIRS
    pairs.announce("cli")
    figures = [version_figure(count)]
    notes = [imports(["--version"], pairs.environment())]
    if os.geteuid() == 0 and all(
        shutil.which(word, path=pairs.environment()["PATH"]) for word in ("slurmctld", "munged")
    ):
        with cluster() as ready:
            figures.append(submit_figure(ready, count))
            notes.append(imports(["submit", str(ready.job)], ready.environment))
    else:
        notes.append("submit was not measured: it needs root and apt-get install slurmctld slurmd slurm-client munge")
    pairs.show("cli: what a person waits for", figures, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
