"""Plan → the text of a batch script. Pure: nothing is probed, and what is shown is what is submitted."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence

from ..errors import HpcmlError
from ..job import clock
from ..plan import Plan, warning_s
from ..site import Site

_HEADER = """\
#!/bin/bash
# {title}
# Rendered by `hpcml render`; edit the job file and render again.
"""

_ENVIRONMENT = """
set -uo pipefail
umask 077
{find}export HPCML_PROJECT="${{HPCML_PROJECT:-$SLURM_SUBMIT_DIR}}"
export HPCML_RUNS="${{HPCML_RUNS:-{runs}}}"
cd "$HPCML_PROJECT" || exit 2
"""

# Bash alone: no command of PATH is needed yet. A job file outside the project is named by its whole path.
_FIND = """\
if [ -z "${{HPCML_PROJECT:-}}" ]; then  # where sbatch was typed, or the nearest folder above it with the job file
  job={job}
  HPCML_PROJECT=$SLURM_SUBMIT_DIR
  until [ -f "$HPCML_PROJECT/$job" ] || [ -z "$HPCML_PROJECT" ]; do HPCML_PROJECT=${{HPCML_PROJECT%/*}}; done
  if [ -z "$HPCML_PROJECT" ]; then
    echo "hpcml: no job file $job in $SLURM_SUBMIT_DIR or above it" >&2
    echo "  fix: submit from the project's folder, or set HPCML_PROJECT" >&2
    exit 2
  fi
fi
"""

_PYTHON = """
# The project's Python: the first of these.
python=""
for candidate in {candidates}; do
  if [ -n "$candidate" ]; then python=$candidate; break; fi
done
if ! "$python" -P -c "import hpcml" 2>/dev/null; then
  echo "hpcml: no Python with hpcml (${{python:-none found}}): set HPCML_PYTHON, [env] in the job file, or VIRTUAL_ENV," >&2
  echo "  or make $HPCML_PROJECT/.venv (scripts/setup)" >&2
  if [ -n "${{HPCML_SUBMITTED:-}}" ]; then
    marker='{{"state": "FAILED", "exit_code": 2, "final": true, "reason": "no Python with hpcml on the node"}}'
    echo "$marker" >"$HPCML_RUNS/$HPCML_RUN/status.json"
  fi
  exit 2
fi
"""

_UNPACK = """
unpack() {  # the code as hpcml submit packed it; a requeued job finds it unpacked
  local run=$HPCML_RUNS/$HPCML_RUN
  if [ ! -f "$run/code.tar" ]; then return; fi
  tar -xf "$run/code.tar" -C "$run/code" --no-same-owner --no-same-permissions && rm -f "$run/code.tar" && return
  marker='{"state": "FAILED", "exit_code": 2, "final": true, "reason": "the code could not be unpacked"}'
  echo "$marker" >"$run/status.json"
  exit 2
}
"""

_OPEN = """
# hpcml submit has made the run directory of this job already; a plain sbatch, also one typed in a run, makes it here.
if [ -n "${{HPCML_SUBMITTED:-}}" ]; then
  unset HPCML_SUBMITTED
  unpack
else
  HPCML_RUN=$("$python" -P -m hpcml.node.batch open {job} --site {site}{overrides}) || exit
  export HPCML_RUN
fi
"""

# srun runs in the foreground: bash then holds a trap back until srun has ended, and `$?` is srun's own. (A `wait` that a
# trap interrupted may give -1 for good.) srun and its tasks have been sent the signal by Slurm itself.
_RUN = """
# One worker a task. Signals end the tasks first; the run's end marker is written last.
signal=""
trap 'signal=TERM' TERM
trap 'signal=USR2' USR2
{srun}
code=$?
"$python" -P -m hpcml.node.batch close "$code" --signal "$signal"
exit "$code"
"""


# A step of a chain knows its run directory from who submitted it, and others from there.
_STEP = """
if [ -z "${{HPCML_SUBMITTED:-}}" ]; then
  echo "hpcml: this is a step of a chain, and hpcml alone knows the runs of the others" >&2
  echo "  fix: hpcml submit {job} --step {step}" >&2
  exit 2
fi
unset HPCML_SUBMITTED
unpack
"""


_COMPARISON = """
unset HPCML_SUBMITTED
worst=0
comparison=$HPCML_RUN
signal=""
trap 'signal=TERM' TERM
trap 'signal=USR2' USR2
variant() {  # variant NAME COMMAND...: one step with a run directory of its own; none begins after a TERM
  if [ "$signal" = TERM ]; then return; fi
  export HPCML_RUN="$comparison/$1"
  unpack
  shift
  "$@"
  code=$?
  "$python" -P -m hpcml.node.batch close "$code" --signal "$signal"
  if [ "$code" -ne 0 ]; then worst=$code; fi
}
"""

_COMPARED = """
export HPCML_RUN=$comparison
"$python" -P -m hpcml.node.batch close "$worst" --signal "$signal"
exit "$worst"
"""


def render(plan: Plan, site: Site, overrides: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """Return the batch script of a plan.

    Args:
        overrides: ``{"params": {…}, "settings": {…}}`` as typed on the command line, so that the script alone gives
            the same run; they are data in it, quoted once.

    Raises:
        HpcmlError: the site has no queue.
    """
    given = {key: dict(values) for key, values in (overrides or {}).items() if values}
    quoted = f" \\\n    --overrides {shlex.quote(json.dumps(given))}" if given else ""
    job = shlex.quote(plan.job_file or "")
    opening = _OPEN.format(job=job, site=shlex.quote(site.name), overrides=quoted)
    return _job(plan, site, _find(plan), opening)


def render_step(plan: Plan, site: Site, step: str) -> str:
    """Return the batch script of one step of a chain; ``hpcml submit`` has made its run directory."""
    opening = _STEP.format(job=shlex.quote(plan.job_file or ""), step=shlex.quote(step))
    return _job(plan, site, "", opening)


def _job(plan: Plan, site: Site, find: str, opening: str) -> str:
    """The script of one run: ``find`` finds the project, ``opening`` the run directory."""
    _needs_queue(site)
    return "".join(
        [
            _HEADER.format(title=f"{plan.name}: {' '.join(plan.target)}, for the site {site.name}".replace("\n", " ")),
            *directives(plan),
            _ENVIRONMENT.format(find=find, runs=_shell_path(site.runs)),
            _modules(plan),
            _PYTHON.format(candidates=_candidates(plan)),
            _UNPACK,
            opening,
            _RUN.format(srun=_srun(plan)),
        ]
    )


def render_comparison(parent: Plan, plans: Sequence[Plan], site: Site) -> str:
    """Return the batch script of a comparison: one job, its variants as steps one after the other on the same nodes.

    The run directories are made by ``hpcml compare``; the script runs them in the order given.
    """
    _needs_queue(site)
    parts = [
        _HEADER.format(title=f"{parent.name}: {', '.join(plan.name for plan in plans)}, one after the other"),
        *directives(parent),
        _ENVIRONMENT.format(find="", runs=_shell_path(site.runs)),
        _modules(parent),
        _PYTHON.format(candidates=_candidates(parent)),
        _UNPACK,
        _COMPARISON,
    ]
    parts += [f"variant {shlex.quote(plan.name)} {_srun(plan, exact=True)}\n" for plan in plans]
    parts.append(_COMPARED)
    return "".join(parts)


def render_functions(plan: Plan, site: Site, *, array: bool) -> str:
    """Return the script that runs functions; submitit writes the ``#SBATCH`` lines and ends in this script.

    Args:
        array: whether each job of an array has its own run directory, named by its index, below ``$HPCML_RUN``.
    """
    _needs_queue(site)
    return "".join(
        [
            f"#!/bin/bash\n# {plan.name}: a function, for the site {site.name}\n",
            _ENVIRONMENT.format(find="", runs=_shell_path(site.runs)),
            'export HPCML_RUN="$HPCML_RUN/$SLURM_ARRAY_TASK_ID"\n' if array else "",
            "unset HPCML_SUBMITTED\n",
            _modules(plan),
            _PYTHON.format(candidates=_candidates(plan)),
            _RUN.format(srun=_srun(plan)),
        ]
    )


def directives(plan: Plan) -> list[str]:
    """Return the ``#SBATCH`` lines of a plan."""
    slurm = plan.slurm
    options: list[tuple[str, object]] = [
        ("job-name", plan.name),
        ("nodes", plan.nodes),
        ("ntasks-per-node", plan.tasks_per_node),
        ("cpus-per-task", plan.cpus_per_task),
        ("gres", plan.gres),
        ("mem", f"{plan.mem_gb}G" if plan.mem_gb else None),
        ("time", clock(plan.time_s)),
        ("partition", slurm.partition),
        ("account", slurm.account),
        ("qos", slurm.qos),
        ("constraint", slurm.constraint),
        ("reservation", slurm.reservation),
        ("output", "slurm-%j.out"),
        *_again(plan),
    ]
    lines = [f"#SBATCH --{key}{_given(value)}\n" for key, value in options if value is not None]
    return lines + [
        f"#SBATCH {key}{'=' if given else ''}{_word(value)}\n" for key, given, value in map(_split, slurm.extra)
    ]


def _again(plan: Plan) -> list[tuple[str, object]]:
    """What lets a job be requeued: a warning to its steps before the time limit, and a log that is not begun anew."""
    if not plan.slurm.max_requeues:
        return []
    return [("requeue", ""), ("open-mode", "append"), ("signal", f"USR2@{warning_s(plan.time_s)}")]


def _given(value: object) -> str:
    return f"={_word(str(value))}" if value != "" else ""


def _split(option: str) -> tuple[str, str, str]:
    return option.partition("=")


def _word(value: str) -> str:
    """sbatch splits an #SBATCH line at spaces and cuts it at ``#`` unless quoted; a backslash escapes, in quotes too."""
    if re.fullmatch(r"[\w.,:/%@+=*\[\]&|()-]*", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _srun(plan: Plan, *, exact: bool = False) -> str:
    """Return the step. srun does not inherit --cpus-per-task since Slurm 22.05, so it is always passed."""
    words = ["srun", f"--nodes={plan.nodes}", f"--ntasks={plan.tasks}", f"--ntasks-per-node={plan.tasks_per_node}"]
    words += [f"--cpus-per-task={plan.cpus_per_task}"]
    if exact and plan.gres:
        words.append(f"--gres={plan.gres}")
    return " ".join([*words, "--kill-on-bad-exit=1", '"$python"', "-P", "-m", "hpcml.node.worker"])


def _find(plan: Plan) -> str:
    job = plan.job_file or "/"
    return "" if job.startswith("/") else _FIND.format(job=shlex.quote(job))


def _modules(plan: Plan) -> str:
    if not plan.env.modules:
        return ""
    # The module function of some sites reads unset variables.
    return f"set +u; module load {' '.join(map(shlex.quote, plan.env.modules))}; set -u\n"


def _candidates(plan: Plan) -> str:
    own = f" {_shell_path(plan.env.python, quote=True)}" if plan.env.python else ""
    return f'"${{HPCML_PYTHON:-}}"{own} "${{VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}}" "$HPCML_PROJECT/.venv/bin/python"'


def _shell_path(path: str, *, quote: bool = False) -> str:
    """Return a site's path for use inside double quotes: variables stay, all else that a shell would act on is inert."""
    inert = re.sub(r'([`"\\])', r"\\\1", path)
    inert = re.sub(r"\$(?![A-Za-z_]|\{\w+\})", r"\\$", inert)
    return f'"{inert}"' if quote else inert


def _needs_queue(site: Site) -> None:
    if site.scheduler != "slurm":
        raise HpcmlError(
            f"site {site.name!r} has no queue, so there is no batch script",
            fix="--site generic renders for any Slurm cluster; hpcml run JOB runs it here",
        )
