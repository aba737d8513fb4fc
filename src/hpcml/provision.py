"""What a new run directory is filled with before anything starts: the code, where it comes from, the plan."""

import time
from pathlib import Path

from . import rundir, snapshot
from .plan import Plan
from .rundir import RunDir
from .tracking import provenance


def fill(run: RunDir, decided: Plan, slurm_job_id: int | None = None, *, packed: bool = False) -> None:
    """Fill a new run directory: the code's snapshot with its parameters, the plan last.

    Args:
        packed: for a queue: the snapshot's files in one archive, which the job unpacks.

    Raises:
        HpcmlError: the project can't be copied.
    """
    project = Path(decided.project)
    record_origins = provenance.begin(run, decided)  # git works while the files are copied
    copied = None
    try:
        if decided.work != "function":
            work = decided.target[0] if decided.work in ("notebook", "script") else None
            archive = run.archive if packed else None
            copied = snapshot.begin(project, run.code, skip=run.root, work=work, archive=archive)
            if decided.work == "script" and decided.inject and decided.params:
                snapshot.inject(run.code / decided.target[0], decided.params)
        if slurm_job_id is not None:
            rundir.write_json(run.submitted, {"slurm_job_id": slurm_job_id, "submitted": time.time()})
    finally:
        record_origins()
    if copied:
        copied()
    rundir.write_json(run.plan, decided.to_json())
