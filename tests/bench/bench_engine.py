"""How much the engine costs: the same notebook through hpcml's execute() and through nbclient alone, both in this process.

    python tests/bench/bench_engine.py [--pairs N]

Imports are done before the clock starts; each measurement reads the notebook, starts a kernel, runs the cells, ends the
kernel and writes the result. Pairs alternate their order. The aim is a median ratio of at most 1.15, and at most one
write of the output notebook a second, beside the first and the last.
"""

import argparse
import contextlib
import io
import itertools
import statistics
import tempfile
import threading
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from hpcml.notebook.execute import execute

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
    NotebookClient(node, kernel_name="python3", resources={"metadata": {"path": str(output.parent)}}).execute()
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


def main(pairs: int = 5) -> float:
    """Print the pairs and the writes; return the ratio of the medians."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        notebook = write_notebook(folder / "bench.ipynb", CELLS)
        both = {"hpcml": with_hpcml, "nbclient": with_nbclient}
        for run in both.values():  # the first of each imports what is left and warms the file cache
            run(notebook, folder / "warm.ipynb")
        seconds: dict[str, list[float]] = {key: [] for key in both}
        for pair in range(pairs):
            for key in sorted(both, reverse=pair % 2 == 1):
                started = time.perf_counter()
                both[key](notebook, folder / f"{key}.ipynb")
                seconds[key].append(time.perf_counter() - started)
            order = "hpcml first" if pair % 2 == 0 else "nbclient first"
            print(
                f"pair {pair + 1}: hpcml {seconds['hpcml'][-1]:.3f} s, nbclient {seconds['nbclient'][-1]:.3f} s ({order})"
            )
        medians = {key: statistics.median(values) for key, values in seconds.items()}
        ratio = medians["hpcml"] / medians["nbclient"]
        print(
            f"median: hpcml {medians['hpcml']:.3f} s, nbclient {medians['nbclient']:.3f} s, ratio {ratio:.2f} (aim: 1.15)"
        )
        times, took = measure_writes(folder)
        gaps = [later - earlier for earlier, later in itertools.pairwise(times[:-1])]  # the last write is the end's
        shortest = f"{min(gaps):.2f} s" if gaps else "none"
        print(f"writes: {len(times)} in {took:.1f} s, shortest pause while running {shortest} (aim: 1 s)")
    return ratio


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    main(parser.parse_args().pairs)
