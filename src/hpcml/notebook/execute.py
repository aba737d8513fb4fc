"""Run one notebook, as the worker on a node starts it.

    python -m hpcml.notebook.execute INPUT OUTPUT [--parameters FILE] [--cwd DIR]
                                     [--run-root ROOT --run-id ID --rank N --restart N]

Exit codes: 0 done, 1 a cell failed or the kernel died, 2 the input is wrong, 75 a training saved and stopped as it was
asked to, 130 and 143 stopped by SIGINT and SIGTERM.
A failure is three lines on stderr; the traceback is in the log, which is stdout.
"""

import argparse
import functools
import json
import logging
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import INTERRUPTED, HpcmlError, JobFailed, Problem, Stopped, nearest
from ..facts import declared_parameters
from ..rundir import RunDir, heeds_stop
from ..tracking.journal import Journal

# A Python environment on a parallel file system, cold, may take minutes to import.
START_TIMEOUT_S = 300


def execute(
    notebook: Path,
    output: Path,
    parameters: Mapping[str, Any],
    *,
    cwd: Path,
    journal: Journal | None = None,
    heeds: Callable[[], bool] = lambda: False,
) -> None:
    """Run a notebook in a kernel of its own; its output appears live on stdout.

    Args:
        notebook: the notebook; it isn't changed.
        output: where the executed notebook goes, in a folder that exists.
        parameters: values for the cell tagged ``parameters``: None, bool, int, float, str, lists and dicts of these.
        cwd: the kernel's working directory.
        journal: gets a ``progress`` record at each code cell.
        heeds: whether what runs in a cell is asked to stop by other means too, and then ends by itself.

    Raises:
        JobFailed: a cell failed, the kernel died, or it never answered. The output notebook shows how far it came.
        HpcmlError: the notebook, a parameter, the environment or the output's folder is wrong.
        KeyboardInterrupt: SIGINT.
        SystemExit: SIGTERM, with code 143; with 75, Stopped: a training saved and stopped as it was asked to. The output
            notebook is written first.
    """
    node = _read(notebook)
    if not cwd.is_dir():
        raise HpcmlError(f"the working directory {cwd} doesn't exist", origin=str(notebook), fix="check --cwd")
    try:
        import papermill
        from papermill.engines import papermill_engines
        from papermill.exceptions import PapermillExecutionError

        from .engine import HpcmlEngine
        from .live import Output
        from .running import Session
    except ModuleNotFoundError as error:
        raise _no_module(error) from None
    language = HpcmlEngine.nb_language(node)
    if language in ("python", "ipython"):
        _check_parameters(notebook, parameters)
    logging.getLogger("papermill").addHandler(logging.NullHandler())
    logging.getLogger("papermill").propagate = False
    papermill_engines.register("hpcml", HpcmlEngine)  # also where hpcml is imported without being installed
    session = Session(str(notebook), Output(output.absolute()), cwd.absolute(), journal, heeds=heeds)
    try:
        papermill.execute_notebook(
            node, None, dict(parameters), engine_name="hpcml", progress_bar=False, start_timeout=START_TIMEOUT_S,
            kernel_name=HpcmlEngine.nb_kernel_name(node), language=language, session=session,
        )  # fmt: skip
    except PapermillExecutionError as error:
        assert session.output is not None
        session.output.write()  # again, with the marker that papermill has put in by now
        if error.ename == Stopped.__name__:
            raise Stopped(error.evalue) from None
        raise _failed(error, session, output) from None


class KernelKilled(JobFailed):
    """The kernel was killed by SIGKILL. The exit code says so, because only Slurm knows whether memory ran out."""

    exit_code = 128 + signal.SIGKILL


def _failed(error: Any, session: Any, output: Path) -> JobFailed:
    from .live import plain

    cell = session.cells.get(error.cell_index) or f"cell at position {error.cell_index + 1}"
    first = next((line for line in plain(error.evalue).splitlines() if line.strip()), "")
    reason = textwrap.shorten(f"{error.ename}: {first}" if first else error.ename, 200, placeholder=" …")
    fix = f"the traceback is in the log; executed so far: {output}"
    if error.ename == "DeadKernelError":
        fix = f"ask for more memory if it ran short, else look for native code that crashed; executed so far: {output}"
    kind = KernelKilled if error.ename == "DeadKernelError" and "SIGKILL" in error.evalue else JobFailed
    return kind(f"{cell} failed\n  {reason}", origin=session.notebook, fix=fix)


def _read(notebook: Path) -> Any:
    try:
        import nbformat
        from nbformat.warnings import DuplicateCellId, MissingIDFieldWarning
    except ModuleNotFoundError as error:
        raise _no_module(error) from None
    try:
        with warnings.catch_warnings():
            for category in (DuplicateCellId, MissingIDFieldWarning):  # mended on reading
                warnings.simplefilter("ignore", category)
            return nbformat.read(notebook, as_version=4)
    except FileNotFoundError:
        raise HpcmlError("no such notebook", origin=str(notebook), fix="check the job's notebook key") from None
    except Exception as error:  # nbformat lets through whatever its readers of old formats stumble over
        detail = textwrap.shorten(str(error), 120, placeholder=" …")
        fix = "open and save it in JupyterLab"
        raise HpcmlError(f"not a notebook that can be read: {detail}", origin=str(notebook), fix=fix) from None


def _no_module(error: ModuleNotFoundError) -> HpcmlError:
    return HpcmlError(
        f"{sys.executable} has no {error.name}, so it can't run notebooks", origin="the job's environment",
        fix=f"install it: {sys.executable} -m pip install 'hpcml[notebook]'",
    )  # fmt: skip


def _check_parameters(notebook: Path, parameters: Mapping[str, Any]) -> None:
    if not parameters:
        return
    declared = declared_parameters(notebook)
    known = list(declared.defaults) if declared else []
    allowed = ", ".join(known) or "none: it has no cell tagged 'parameters'"
    unknown = [name for name in parameters if name not in known]
    problems = [
        Problem(
            f"no parameter {name!r}", str(notebook), allowed, nearest(name, known) or "add it to the parameters cell"
        )
        for name in unknown
    ]
    if problems:
        raise HpcmlError(problems)


def _read_parameters(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HpcmlError(f"parameters can't be read: {error}", origin=str(path), fix="a JSON object, UTF-8") from None
    if not isinstance(value, dict):
        raise HpcmlError("parameters are not a JSON object", origin=str(path), allowed='{"epochs": 3}')
    return value


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m hpcml.notebook.execute", description="Run one notebook.")
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--parameters", type=Path, metavar="FILE", help="a JSON object")
    parser.add_argument("--cwd", type=Path, default=Path(), help="the kernel's working directory")
    parser.add_argument("--run-root", type=Path, help="with --run-id: the run whose journal gets the progress")
    parser.add_argument("--run-id")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--restart", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the notebook that the command line names and return the exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    given = _arguments(argv)
    journal, heeds = None, functools.partial(bool, 0)
    try:
        if given.run_root and given.run_id:
            run = RunDir(given.run_root, given.run_id)
            journal = Journal(run.event_file(given.rank, given.restart, "engine"))
            heeds = functools.partial(heeds_stop, run, given.restart)
        parameters = _read_parameters(given.parameters)
        execute(given.input, given.output, parameters, cwd=given.cwd, journal=journal, heeds=heeds)
    except HpcmlError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        print(stop.args[0] if stop.args else f"{given.input}: stopped by SIGINT", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:
        print(getattr(stop, "text", f"{given.input}: stopped by SIGTERM"), file=sys.stderr)
        return int(stop.code or 0)
    finally:
        if journal:
            journal.close()
    return 0


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
