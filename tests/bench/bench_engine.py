"""How much the engine costs: the same notebook through hpcml's execute() and through nbclient alone, both in this process.

Two notebooks: one of ten cells that do next to nothing, and notebooks/simple2GPUsOrig.ipynb of the quickstart.

    scripts/bench engine [--quick]

Imports are done before the clock starts; each measurement reads the notebook, starts a kernel, runs the cells, ends the
kernel and writes the result. The output notebook is to be written at most once a second, beside the first and the last.
"""

import argparse
import contextlib
import io
import itertools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from bench import pairs
from hpcml.notebook.execute import execute

PAIRS = 10
BOUND = pairs.Bound(1.15, at_least=False, pairs=PAIRS)
QUICKSTART = Path(__file__).resolve().parents[2] / "notebooks" / "simple2GPUsOrig.ipynb"
QUICKSTART_PAIRS = 4  # of half a minute
QUICKSTART_BOUND = pairs.Bound(1.15, at_least=False, pairs=QUICKSTART_PAIRS)
CELLS = [
    "import math, sys",
    "epochs = 3\nlr = 0.1",
    "print('lines', *range(20), sep='\\n')",
    "for epoch in range(epochs):\n    print(epoch, math.exp(-epoch), flush=True)",
    "print('a warning', file=sys.stderr)",
    "[math.sqrt(n) for n in range(100)]",
    "table = {n: n * n for n in range(200)}",
    "sum(table.values())",
    "print('x' * 5000)",
    "'done'",
]
SLOW = ["import time", *["for step in range(8):\n    print(step, flush=True)\n    time.sleep(0.1)"] * 6]


def write_notebook(path: Path, sources: list[str]) -> Path:
    """Write a notebook of code cells under one heading."""
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [new_markdown_cell("# Bench"), *map(new_code_cell, sources)]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernelspec}), path)
    return path


def with_hpcml(notebook: Path, output: Path) -> None:
    """Run a notebook as a worker's child would, its log kept in memory."""
    with contextlib.redirect_stdout(io.StringIO()):
        execute(notebook, output, {}, cwd=output.parent)


def with_nbclient(notebook: Path, output: Path) -> None:
    """Run a notebook with nbclient's own defaults."""
    node = nbformat.read(notebook, as_version=4)
    quiet = ["--log-level=ERROR"]  # its transport is TCP, of which the kernel warns
    resources = {"metadata": {"path": str(output.parent)}}
    NotebookClient(node, kernel_name="python3", resources=resources, extra_arguments=quiet).execute()
    nbformat.write(node, output)


def count_writes(output: Path, stop: threading.Event) -> list[float]:
    """Return when the file was replaced, looking every 5 ms until told to stop."""
    seen, times = None, []
    while not stop.wait(0.005):
        with contextlib.suppress(FileNotFoundError):
            stat = output.stat()
            if (stat.st_ino, stat.st_mtime_ns) != seen:
                seen = (stat.st_ino, stat.st_mtime_ns)
                times.append(time.monotonic())
    return times


def measure_writes(folder: Path) -> tuple[list[float], float]:
    """Run a notebook of about five seconds and return the times of its writes and its duration in seconds."""
    notebook, output = write_notebook(folder / "slow.ipynb", SLOW), folder / "slow.out.ipynb"
    stop, found = threading.Event(), list[float]()
    watcher = threading.Thread(target=lambda: found.extend(count_writes(output, stop)))
    watcher.start()
    started = time.monotonic()
    with_hpcml(notebook, output)
    took = time.monotonic() - started
    stop.set()
    watcher.join()
    return found, took


def timed(run: Callable[[Path, Path], None], notebook: Path, output: Path) -> float:
    """Return the seconds that one run of a notebook takes."""
    started = time.perf_counter()
    run(notebook, output)
    return time.perf_counter() - started


def figure(notebook: Path, what: str, count: int, bound: pairs.Bound) -> pairs.Figure:
    """Measure one notebook."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        both = pairs.in_turn(
            lambda: timed(with_hpcml, notebook, folder / "hpcml.ipynb"),
            lambda: timed(with_nbclient, notebook, folder / "nbclient.ipynb"),
        )
        both(True)  # the first of each imports what is left and warms the file cache
        measured = []
        for pair in pairs.measure(both, least=count):
            measured.append(pair)
            pairs.progress(notebook.stem, pair, len(measured))
    told = f"{what}, from reading it to the result on disk, imports of the engine excluded."
    return pairs.Figure(notebook.stem, told, ("hpcml", "nbclient"), "s", measured, bound)


def main() -> int:
    """Print the table and the writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one or two pairs, nothing is judged")
    quick = parser.parse_args().quick
    pairs.announce("engine")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = f"sqlite:///{folder / 'mlflow.db'}"
        os.environ.update({"HPCML_RUNS": str(folder / "runs"), "HPCML_SITE": "local", "MLFLOW_TRACKING_URI": store})
        few = write_notebook(folder / "cells.ipynb", CELLS)
        figures = [
            figure(few, f"a notebook of {len(CELLS)} cells", 2 if quick else PAIRS, BOUND),
            figure(QUICKSTART, "the notebook, training included", 1 if quick else QUICKSTART_PAIRS, QUICKSTART_BOUND),
        ]
        times, took = measure_writes(folder)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times[:-1])]  # the last write is the end's
    shortest = f"{min(gaps):.2f} s" if gaps else "none"
    writes = (
        f"Output notebook: {len(times)} writes in {took:.1f} s, shortest pause while running {shortest} (at least 1 s)."
    )
    pairs.show("engine: what the engine costs a notebook", figures, [writes])
    return 0


if __name__ == "__main__":
    sys.exit(main())
