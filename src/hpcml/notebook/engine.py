"""The papermill engine ``hpcml``: live log, output notebook written whole, no ports, a kernel's death noticed.

    papermill in.ipynb out.ipynb --engine hpcml

papermill keeps what it is good at (parameters, per-cell metadata, the error marker) and nbclient runs the cells. The
engine has no base class on purpose: papermill loads it while papermill itself is being imported.
"""

import asyncio
import math
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import kernel as kernels
from .live import Output
from .running import Execution, Session, number_cells


class HpcmlEngine:
    """What papermill calls; see its ``Engine`` for the contract."""

    @classmethod
    def execute_notebook(
        cls, nb: Any, kernel_name: str, output_path: str | None = None, *, session: Session | None = None,
        start_timeout: int = 300, execution_timeout: int | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """Run a notebook's cells in order and return it; a failed cell's error is in its outputs.

        Args:
            start_timeout: seconds that the kernel may take to answer.
            execution_timeout: seconds for each cell; None sets no limit.

        Raises:
            JobFailed: the kernel never answered.
            HpcmlError: no such kernel, or the output can't be written.
            KeyboardInterrupt: SIGINT. Terminated: SIGTERM. The output is written in each case.
        """
        from papermill.engines import NotebookExecutionManager

        local = output_path not in (None, "-") and "://" not in str(output_path)
        session = session or Session(
            str(options.get("input_path") or "notebook"), Output(Path(str(output_path)).absolute()) if local else None
        )
        marks = NotebookExecutionManager(nb, output_path=None, progress_bar=False)
        marks.notebook_start()
        _prepare(nb, session)
        files = {"stdout": options.get("stdout_file"), "stderr": options.get("stderr_file")}
        execution = Execution(
            nb, marks, kernel_name, cls.nb_language(nb), session, start_timeout, execution_timeout, files
        )
        try:
            _run(execution.run())
        finally:
            marks.notebook_complete()
            if session.output:
                session.output.write()
        return nb

    @classmethod
    def nb_kernel_name(cls, nb: Any, name: str | None = None) -> str:
        """Return the kernel that a notebook asks for; Python where it asks for none."""
        return str(name or nb.metadata.get("kernelspec", {}).get("name") or kernels.NATIVE)

    @classmethod
    def nb_language(cls, nb: Any, language: str | None = None) -> str:
        """Return a notebook's language; Python where it names none."""
        metadata = nb.metadata
        named = metadata.get("language_info", {}).get("name") or metadata.get("kernelspec", {}).get("language")
        return str(language or named or "python")


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end; inside a running loop (a notebook that runs notebooks) in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, work).result()


def _prepare(nb: Any, session: Session) -> None:
    """Number the cells, complete the metadata and write the output for the first time."""
    session.cells = number_cells(nb)
    if "kernelspec" not in nb.metadata:
        nb.metadata["kernelspec"] = {"name": kernels.NATIVE, "display_name": "Python 3", "language": "python"}
    papermill = nb.metadata.papermill
    papermill["parameters"] = _valid_json(papermill.get("parameters", {}))
    papermill["input_path"] = session.notebook
    if session.output:
        papermill["output_path"] = str(session.output.path)
        session.output.begin(nb)


def _valid_json(value: Any) -> Any:
    """Spell NaN and infinities as text: JSON has none, and a browser refuses a notebook that holds one."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _valid_json(item) for key, item in value.items()}
    return [_valid_json(item) for item in value] if isinstance(value, list) else value
