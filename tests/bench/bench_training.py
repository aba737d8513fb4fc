"""What hpcml costs a training: the same script under ``hpcml run`` and bare, in samples a second.

    scripts/bench training [--quick]

The script is the notebook notebooks/simple2GPUsOrig.py up to its training: a small network with short epochs, so that
whatever hpcml does in an epoch shows. Bare it has no ``begin()`` and no callbacks, but the same environment variables, so
that both sides compute on the same devices, with the same threads and the same Keras. Both carry the same clock: it
counts from the second epoch on, without validation, and includes what the callbacks before it do.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import pairs
from hpcml import facts
from hpcml.node import bootstrap

PROJECT = Path(__file__).resolve().parents[2]
NOTEBOOK = PROJECT / "notebooks" / "simple2GPUsOrig.py"
HPCML = str(Path(sys.executable).with_name("hpcml"))
SECONDS = 10.0  # of training on each side of a pair
PAIRS, MOST_PAIRS = 12, 24
LIMIT_S = 25 * 60
BOUND = pairs.Bound(0.99, at_least=True, pairs=PAIRS, width=0.04)
TIMEOUT_S = 300  # for one side: start, first epoch, measurement, and under hpcml its end
STOP_S = 60  # hpcml ends its workers within 25 s of TERM

JOB = """\
name = "bench"
script = "under_hpcml.py"
strategy = "original"
[resources]
gpus_per_node = {gpus}
cpus_per_task = {cores}
"""

# Stops the training after so many seconds on the clock and writes the samples a second. The first epoch builds the
# graph and is left out. Keras calls callbacks in their order: those of hpcml come first, so their work is counted.
CLOCK = '''
import os
import time


class Clock(tf.keras.callbacks.Callback):
    """Samples a second from the second epoch on, without validation."""

    def __init__(self):
        super().__init__()
        self.seconds, self.steps, self.began = 0.0, 0, None

    def on_test_begin(self, logs=None):
        self.pause()

    def on_test_end(self, logs=None):
        if self.began is not None:
            self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.pause()
        if epoch > 0:
            self.steps += len(train)
        if self.seconds >= float(os.environ["BENCH_SECONDS"]):
            self.model.stop_training = True
        self.began = time.perf_counter()

    def pause(self):
        if self.began is not None:
            self.seconds += time.perf_counter() - self.began

    def on_train_end(self, logs=None):
        with open(os.environ["BENCH_RESULT"], "w") as file:
            file.write(str(self.steps * global_batch / self.seconds))


'''


def script(notebook: str, *, bare: bool) -> str:
    """Return the training of a notebook in percent format as a script, with the clock, and bare without hpcml.

    Raises:
        ValueError: the notebook no longer has a line that this changes.
    """
    text, _, _ = notebook.partition("# %% [markdown]\n# ## Result\n")
    changes = {
        "epochs = 5": "epochs = 100_000",
        "history = model.fit(": CLOCK + "history = model.fit(",
        "callbacks=run.callbacks(global_batch=global_batch)": "callbacks=[*run.callbacks(global_batch=global_batch), Clock()]",
    }
    if bare:  # hpcml stays for its data sets alone
        changes['run = hpcml.begin(strategy="original")\n'] = ""
        changes["[*run.callbacks(global_batch=global_batch), Clock()]"] = "[Clock()]"
    for old, new in changes.items():
        if text.count(old) != 1:
            raise ValueError(f"{text.count(old)} times {old!r} in the notebook, 1 is wanted: adapt bench_training.py")
        text = text.replace(old, new)
    return text if bare else text + "run.finish()\n"


class Training:
    """Both sides, in a project folder of their own."""

    def __init__(self, folder: Path, seconds: float) -> None:
        notebook = NOTEBOOK.read_text(encoding="utf-8")
        gpus, cores = min(1, facts.count_gpus()), len(os.sched_getaffinity(0))
        self.folder = folder
        self.result = folder / "result"
        files = {
            "under_hpcml.py": script(notebook, bare=False),
            "bare.py": script(notebook, bare=True),
            "bench.toml": JOB.format(gpus=gpus, cores=cores),
        }
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        clock = {"BENCH_SECONDS": str(seconds), "BENCH_RESULT": str(self.result)}
        self.environment = pairs.environment() | clock | {"HPCML_PROJECT": str(folder)}
        # What hpcml's worker will decide for its own script, with the cores that the launcher hands to it.
        decides = {"HPCML_CPUS_PER_TASK": str(cores)}
        prepared = bootstrap.prepare(self.environment | decides, "original", gpus_per_node=gpus)
        self.variables = {name: value for name, value in prepared.variables.items() if name != bootstrap.HANDOVER}

    def ours(self) -> float:
        """Return the samples a second under ``hpcml run``."""
        return self._samples_per_s([HPCML, "run", "--site", "local", "bench.toml"], self.environment)

    def bare(self) -> float:
        """Return the samples a second of the bare script."""
        return self._samples_per_s([sys.executable, "bare.py"], self.environment | self.variables)

    def _samples_per_s(self, words: list[str], environment: dict[str, str]) -> float:
        self.result.unlink(missing_ok=True)
        log = self.folder / "log.txt"
        with log.open("wb") as file:
            child = subprocess.Popen(
                words, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
            try:
                code = child.wait(TIMEOUT_S)
            finally:
                if child.poll() is None:  # interrupted: TERM, so that hpcml ends its own children
                    child.terminate()
                    child.wait(STOP_S)
        if code or not self.result.exists():
            raise RuntimeError(f"{' '.join(words)}: exit status {code}\n{log.read_text(errors='replace')[-2000:]}")
        return float(self.result.read_text())


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two pairs of 2 s, nothing is judged")
    quick = parser.parse_args().quick
    seconds, least, most = (2.0, 2, 2) if quick else (SECONDS, PAIRS, MOST_PAIRS)
    pairs.announce("training")
    with tempfile.TemporaryDirectory(prefix="hpcml-bench-") as folder:
        sides = Training(Path(folder), seconds)
        sides.bare()  # fills the file cache with TensorFlow, for whichever side comes first
        measured = []
        for pair in pairs.measure(sides.ours, sides.bare, least=least, most=most, width=BOUND.width, limit_s=LIMIT_S):
            measured.append(pair)
            pairs.progress("training", pair, len(measured))
    variables = ", ".join(f"{name}={value}" for name, value in sides.variables.items())
    what = (
        f"{NOTEBOOK.relative_to(PROJECT)} up to its training, at least {seconds:g} s of it from the second epoch on, under "
        "`hpcml run` with begin() and callbacks against the same script without them in plain Python."
    )
    figure = pairs.Figure("CNN", what, ("hpcml", "bare"), "samples/s", measured, BOUND)
    notes = [f"On both sides: {variables}."]
    if len(measured) > least:
        notes.append(f"{least} pairs gave an interval over {BOUND.width:g} wide, so it went on to {len(measured)}.")
    pairs.show("training: what hpcml costs a training", [figure], notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
