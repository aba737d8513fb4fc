"""What an interruption costs: steps trained twice, and whether the weights are those of an uninterrupted run.

    scripts/bench resume [--only=NAME] [--seed=N] [--quick]

Each trial runs a notebook's training under ``hpcml run``, interrupts it at a random moment, and lets it go on by ``hpcml
resume``. Two ways of interruption: USR2 to every process of the ranks, as Slurm sends it before the time limit, and SIGKILL
to one rank's training. The moment is a random step and a random part of the next one's time. The training logs each step
that it has done into the run's journal, so that all executions together can be counted: more steps than the uninterrupted run
has are repeated work. A trial that is killed before its first checkpoint can't be resumed, and begins anew.

Each step is made to last PACE_S seconds longer: between epochs a checkpoint is only due when saving has cost less than 1 %
of the time since the last one, which an epoch of 5 s has room for, and one of 0.2 s has not.

The same seed gives the same moments; what the machine makes of them differs.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench import pairs
from bench.interrupted import ALL, EPOCHS, SCRIPT, STEPS, WEIGHTS, Case, missing, script
from hpcml import rundir
from hpcml.rundir import RunDir
from hpcml.tracking import journal

HPCML = str(Path(sys.executable).with_name("hpcml"))
PACE_S = 0.35
TRIALS = 2  # of each way
MOST_EPOCHS = 1.0  # of repeated work
TIMEOUT_S, LOOK_S = 300.0, 0.02
SIGNALS = ("USR2", "SIGKILL")
WORKER = "hpcml.node.worker"

JOB = """\
name = "{name}"
script = "train.py"
strategy = "{strategy}"
[resources]
gpus_per_node = {devices}
tasks_per_node = {ranks}
cpus_per_task = {cores}
"""


@dataclass(frozen=True)
class Trial:
    """One interrupted training.

    Attributes:
        stopped: the last step before the interruption; ``resumed``: the step of the checkpoint, 0 for none.
        trained: steps of all executions together; ``missing``: steps that none has trained.
        difference: the largest of any weight from the uninterrupted run's.
    """

    case: str
    way: str
    seed: int
    stopped: int
    resumed: int
    trained: int
    missing: int
    difference: float

    @property
    def repeated(self) -> float:
        """Epochs of work that were done more than once."""
        return (self.trained - EPOCHS * STEPS + self.missing) / STEPS

    def holds(self, tolerance: float) -> bool:
        """Whether it cost no more than an epoch, left nothing out and ended with the same weights."""
        return self.repeated <= MOST_EPOCHS and not self.missing and self.difference <= tolerance


class Bench:
    """A case's project, and its uninterrupted run."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        (folder / SCRIPT).write_text(script(case), encoding="utf-8")
        (folder / "pyproject.toml").touch()
        cores = max(1, len(os.sched_getaffinity(0)) // case.ranks)
        job = JOB.format(name=case.name, strategy=case.name, devices=case.devices, ranks=case.ranks, cores=cores)
        (folder / "job.toml").write_text(job, encoding="utf-8")
        self._count = 0
        self.weights = self._uninterrupted()

    def trial(self, way: str, seed: int) -> Trial:
        """Interrupt a training, let it go on, and compare.

        Raises:
            RuntimeError: it could not be interrupted, or did not go on.
        """
        moment = random.Random(seed)
        step, part_s, rank = (
            moment.randrange(1, EPOCHS * STEPS),
            moment.uniform(0, PACE_S),
            moment.randrange(self.case.ranks),
        )
        root = self._runs()
        child = self._start(root, ["run", "job.toml"], PACE_S)
        try:
            run = self._await_step(root, child, step)
            time.sleep(part_s)
            interrupt(child, way, rank)
            code = child.wait(TIMEOUT_S)
        finally:
            end(child)
        if code == 0:
            raise RuntimeError(f"{self.case.name}, seed {seed}: it had ended before {way} reached it")
        stopped = max(steps_of(run), default=0)
        kept = max(0, rundir.kept_at(run)[1])
        self._run(root, ["resume", run.id] if kept else ["run", "job.toml"])
        runs = list(rundir.every(root))
        trained = [step for one in runs for step in steps_of(one)]
        last = max(runs, key=lambda one: one.id)
        missing = len(set(range(1, EPOCHS * STEPS + 1)) - set(trained))
        return Trial(self.case.name, way, seed, stopped, kept, len(trained), missing, difference(last, self.weights))

    def _uninterrupted(self) -> Path:
        root = self._runs()
        self._run(root, ["run", "job.toml"])
        (run,) = rundir.every(root)
        trained = steps_of(run)
        if sorted(trained) != list(range(1, EPOCHS * STEPS + 1)):
            raise RuntimeError(f"{self.case.name}: uninterrupted it has trained steps {trained}")
        return run.path / WEIGHTS

    def _runs(self) -> Path:
        self._count += 1
        return self.folder / f"runs{self._count}"

    def _start(self, root: Path, words: Sequence[str], pace_s: float) -> subprocess.Popen[bytes]:
        own = {"HPCML_PROJECT": str(self.folder), "HPCML_DEVICES": "cpu", "HPCML_RUNS": str(root)}
        environment = {**pairs.environment(), **own, "BENCH_PACE": str(pace_s)}
        with self._log(root).open("ab") as log:
            return subprocess.Popen(
                [HPCML, *words, "--site", "local"], cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def _run(self, root: Path, words: Sequence[str]) -> None:
        child = self._start(root, words, 0.0)
        try:
            if child.wait(TIMEOUT_S):
                raise self._failure(root, f"hpcml {' '.join(words)}: exit status {child.returncode}")
        finally:
            end(child)

    def _await_step(self, root: Path, child: subprocess.Popen[bytes], step: int) -> RunDir:
        """Return the run when it has trained so many steps."""
        deadline, run, reader = time.monotonic() + TIMEOUT_S, None, None
        while child.poll() is None and time.monotonic() < deadline:
            run = run or next(iter(rundir.every(root)), None)
            if run and reader is None:
                reader = journal.Reader(run.events, kinds={"metric"})
            if run and reader and any(one >= step for one in map(step_of, reader.new())):
                return run
            time.sleep(LOOK_S)
        raise self._failure(root, f"it never came to step {step}")

    def _log(self, root: Path) -> Path:
        return self.folder / f"{root.name}.log"

    def _failure(self, root: Path, what: str) -> RuntimeError:
        return RuntimeError(f"{self.case.name}: {what}\n{self._log(root).read_text(errors='replace')[-2000:]}")


def step_of(record: Mapping[str, Any]) -> int:
    """Return the step that a record says rank 0 has trained; 0 for any other record."""
    return int(record["step"]) if not record["rank"] and "trained" in record["values"] else 0


def steps_of(run: RunDir) -> list[int]:
    """Return every step that rank 0 has trained, over all executions of a run."""
    return [step for record in journal.read(run.events, kinds={"metric"}) if (step := step_of(record))]


def difference(run: RunDir, right: Path) -> float:
    """Return the largest difference of any weight; 0 only where all bits are the same."""
    import numpy as np

    with np.load(run.path / WEIGHTS) as ours, np.load(right) as other:
        if ours.files != other.files:
            return float("inf")
        found = [ours[name] for name in ours.files], [other[name] for name in ours.files]
    if all(a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(*found, strict=True)):
        return 0.0
    return max(sys.float_info.min, *(float(np.max(np.abs(a - b), initial=0)) for a, b in zip(*found, strict=True)))


def interrupt(child: subprocess.Popen[bytes], way: str, rank: int) -> None:
    """Send USR2 to all processes of the ranks, as Slurm does, or kill one rank's training.

    Raises:
        RuntimeError: there is no such process any more.
    """
    launched = psutil.Process(child.pid).children()
    workers = sorted(
        (one for one in launched if WORKER in one.cmdline()), key=lambda one: int(one.environ()["HPCML_RANK"])
    )
    if way == "USR2":
        for process in [one for worker in workers for one in [worker, *worker.children(recursive=True)]]:
            process.send_signal(signal.SIGUSR2)
        return
    trainings = [one for one in workers[rank].children() if SCRIPT in one.cmdline()]
    if len(trainings) != 1:
        raise RuntimeError(f"rank {rank} has {len(trainings)} processes of {SCRIPT}")
    trainings[0].kill()


def end(child: subprocess.Popen[bytes]) -> None:
    """End hpcml, with its ranks, if it still runs."""
    if child.poll() is None:
        child.terminate()
        child.wait(TIMEOUT_S)


def show(trials: Sequence[Trial], notes: Sequence[str]) -> None:
    """Print the table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    tolerances = {case.name: case.tolerance for case in ALL}
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    title = "resume: what an interruption costs"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("strategy", "interrupted by", "seed", "after step", "went on from", "epochs repeated", "weights"):
        table.add_column(heading, justify="left" if heading in ("strategy", "interrupted by") else "right")
    table.add_column("verdict")
    for trial in trials:
        same = "the same bits" if not trial.difference else f"{trial.difference:.1e} off"
        numbers = (str(trial.seed), str(trial.stopped), str(trial.resumed), f"{trial.repeated:.2f}", same)
        verdict = "holds" if trial.holds(tolerances[trial.case]) else "does not hold"
        if trial.missing:
            verdict += f": {trial.missing} steps were left out"
        table.add_row(trial.case, trial.way, *numbers, verdict)
    console.print(table)
    console.print(
        f"{EPOCHS} epochs of {STEPS} steps, each {PACE_S} s longer than it takes. At most {MOST_EPOCHS:g} epoch repeated; weights "
        + ", ".join(
            f"{name} {'the same bits' if not most else f'within {most:g}'}" for name, most in tolerances.items()
        )
        + "."
    )
    for note in notes:
        console.print(note)


def measured(cases: Sequence[Case], seed: int, trials: int) -> tuple[list[Trial], list[str]]:
    """Interrupt each case so often in each way; return the trials, and what was left out."""
    found, notes = list[Trial](), list[str]()
    for case in cases:
        if why := missing(case):
            notes.append(why)
            continue
        with tempfile.TemporaryDirectory(prefix="hpcml-bench-") as folder:
            bench = Bench(case, Path(folder))
            for number in range(trials * len(SIGNALS)):
                one = bench.trial(SIGNALS[number % len(SIGNALS)], seed + number)
                found.append(one)
                print(f"bench: resume: {one}: {one.repeated:.2f} epochs repeated", file=sys.stderr)
    return found, notes


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ddp alone, one trial of each way")
    parser.add_argument("--only", action="append", choices=[case.name for case in ALL], help="this one; repeatable")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="by default another each time")
    asked = parser.parse_args()
    pairs.announce("resume")
    print(f"bench: resume: --seed={asked.seed}", file=sys.stderr)
    wanted = asked.only or (["ddp"] if asked.quick else [case.name for case in ALL])
    began = time.monotonic()
    trials, notes = measured([case for case in ALL if case.name in wanted], asked.seed, 1 if asked.quick else TRIALS)
    if not trials:
        print("bench: resume: " + " ".join(notes), file=sys.stderr)
        return 1
    show(trials, [f"Seed {asked.seed}, {time.monotonic() - began:.0f} s.", *notes])
    return 0


if __name__ == "__main__":
    sys.exit(main())
