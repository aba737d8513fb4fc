"""Which Python runs a plan's work. The batch script decides the same on the node."""

import os
import shutil
import sys
from pathlib import Path

from .errors import HpcmlError
from .plan import Plan


def python_of(plan: Plan) -> str:
    """Return the Python that will run the work, as far as it can be seen from here: a path, or a name on PATH.

    ``$HPCML_PYTHON``, then the job's; then what the batch script looks for where it is to be queued (``$VIRTUAL_ENV``,
    the project's ``.venv``), and the one that runs this where it runs here. A relative path is one below the project.
    """
    queued = plan.scheduler != "local" and not os.environ.get("SLURM_JOB_ID")
    venv = os.environ.get("VIRTUAL_ENV")
    otherwise = (f"{venv}/bin/python" if venv else f"{plan.project}/.venv/bin/python") if queued else sys.executable
    wanted = os.environ.get("HPCML_PYTHON") or os.path.expandvars(plan.env.python or "") or otherwise
    return str(Path(plan.project, wanted)) if "/" in wanted else wanted


def need_python(plan: Plan) -> None:
    """Refuse a plan that is to run here with a Python that is not there.

    Raises:
        HpcmlError: its Python can't be executed.
    """
    python = python_of(plan)
    if shutil.which(python):
        return
    forced = bool(os.environ.get("HPCML_PYTHON"))
    own = plan.origins.get("env.python") or plan.origins.get("env.name") or "[env]"
    fix = "unset it, or name a Python that has hpcml" if forced else "make that environment, or name another"
    raise HpcmlError(f"no Python at {python}", origin="HPCML_PYTHON" if forced else f"env.python ({own})", fix=fix)
