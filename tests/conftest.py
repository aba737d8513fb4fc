"""What holds for every test: a clean environment, and a plain word about each test that did not run."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Generator
from typing import Any, TypeVar

import pytest

R = TypeVar("R", pytest.TestReport, pytest.CollectReport)

# Tests set what they need. A developer inside an allocation, or with HPCML_SITE in ~/.bashrc, is to see what CI sees.
FOREIGN = ("HPCML_", "SLURM_", "SBATCH_", "SALLOC_", "SRUN_", "PMIX_", "OMPI_", "MLFLOW_")
REQUIRED = re.findall(r"\w+", os.environ.get("HPCML_TEST_REQUIRE", "").lower())
for variable in [name for name in os.environ if name.startswith(FOREIGN)]:
    if not variable.startswith("HPCML_TEST_"):  # the worker processes of pytest-xdist inherit them
        del os.environ[variable]


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return why a test or a whole file was skipped; empty where it was not."""
    if not report.skipped or not isinstance(report.longrepr, tuple):
        return ""
    return report.longrepr[2].removeprefix("Skipped: ")


def refuse_required(report: R) -> R:
    """Fail what was skipped for want of something that HPCML_TEST_REQUIRE names, as in ``slurm``.

    The reason says what is wanted before its first colon: ``real Slurm: needs root``.
    """
    reason = skip_reason(report)
    wants = reason.partition(":")[0].lower()
    for required in REQUIRED:
        if re.search(rf"\b{required}\b", wants):
            report.outcome = "failed"
            report.longrepr = f"HPCML_TEST_REQUIRE={required}, but this was skipped: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return refuse_required((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return refuse_required((yield))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Say what stays in one process where there are several: a file, and all that is about real clusters.

    Clusters take seconds to start, and their tests look at what is left behind on the machine.
    """
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "slurm" if "/slurm/" in file else file

    return Together(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what was skipped: each reason once, with the files and the number of tests."""
    skipped: defaultdict[str, list[str]] = defaultdict(list)
    for report in terminalreporter.stats.get("skipped", []):
        skipped[skip_reason(report)].append(report.nodeid.partition("::")[0])
    if skipped:
        terminalreporter.section("not tested here")
    for reason, files in skipped.items():
        terminalreporter.write_line(f"{len(files)} in {', '.join(dict.fromkeys(files))}: {reason}")
