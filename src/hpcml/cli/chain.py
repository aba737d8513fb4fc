"""Chains of steps on the command line: what ``run``, ``submit``, ``render``, ``check``, ``resume`` and ``sync`` do with one."""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import queue, rundir
from ..errors import DONE, INTERRUPTED, JOB_FAILED, ServiceSilent
from ..job import clock
from ..pipeline import actions, chain, ready
from ..pipeline.ready import Ready
from ..queue.control import POLL_S
from ..rundir import RunDir
from . import show

if TYPE_CHECKING:
    from rich.table import Table

    from ..queue import State


def prepared(
    path: Path, site: str | None, params: Sequence[tuple[str, str]], settings: Sequence[tuple[str, str]],
    only: Sequence[str], start: str | None, of: str | None, *, here: bool = False, ask_queue: bool = True,
) -> tuple[Ready, Path]:  # fmt: skip
    """Return a chain of which the chosen steps can start, and the runs folder."""
    found = ready.prepare(path, site, dict(params), dict(settings), here=here, ask_queue=ask_queue)
    root = rundir.runs_root(found.site, found.pipeline.project)
    return ready.choose(found, only, start, of, root), root


def render(found: Ready) -> int:
    """Print the batch script of each step, below the command that makes it wait."""
    ids = {step.name: f"<{step.name}>" for step in found.steps if not found.is_here(step)}
    for step, script in chain.scripts(found):
        words = ["sbatch", *chain.options(step.needs, ids)]
        click.echo(f"# ---- step {step.name}: {' '.join(words)}")
        click.echo(script)
    if others := [step.name for step in found.steps if found.is_here(step)]:
        click.echo(f"# no jobs: {', '.join(others)}")
    return DONE


def check(found: Ready, as_json: bool) -> int:
    """Print the preflight of each step."""
    from .. import preflight
    from ..launch.prepare import Prepared

    findings = [preflight.Finding("site", "good", f"{found.site.name} ({found.why})")]
    for step in found.steps:
        waits = f"after {', '.join(step.needs)}" if step.needs else "first"
        if step.action:
            here = "at submit" if step.action == "fetch" else "by hpcml submit --wait, or hpcml sync"
            waits = f"{step.action} {waits}, {here if found.is_here(step) else 'as a job'}"
        findings.append(preflight.Finding(step.name, "good", waits))
        if not step.action:
            looked = preflight.check(Prepared(found.plans[step.name], found.site, found.why, {}))
            findings += [line for line in looked if line not in findings]  # what is the same for all is told once
    return show.findings(findings, as_json)


def run(found: Ready, root: Path, as_json: bool) -> int:
    """Run a chain here and now, step by step."""
    from ..tracking import follow
    from . import jobs

    chain.check_environments(found, here=True)
    with jobs.quiet_stdout(as_json):
        told: list[str] = []
        made = chain.make(found, root, told.append, packed=False)
        announce(found, f"chain {made.id}", told)
        with follow.from_outside(made) as follower:
            chain.run_here(made, _say)
            return ended(made, as_json, follower, log_tail=False)


def submit(found: Ready, root: Path, as_json: bool, *, wait: bool) -> int:
    """Queue a chain."""
    chain.check_environments(found, here=False)
    told: list[str] = []
    made, ids = chain.submit(found, root, told.append)
    if as_json and not wait:
        show.echo_json({"run": made.id, "path": str(made.path), "slurm_job_ids": ids})
        return DONE
    announce(found, f"chain {made.id}, {_jobs(ids)}", told, to_stderr=as_json)
    return wait_for(made, as_json) if wait else DONE


def resume(run_dir: RunDir, as_json: bool, *, wait: bool) -> int:
    """Let a chain go on from the steps that did not complete."""
    from ..tracking import follow
    from . import jobs

    queued = bool(rundir.read_json(run_dir.submitted).get("submitted"))
    ids = chain.resume(run_dir)
    if as_json and queued and not wait:
        show.echo_json({"run": run_dir.id, "path": str(run_dir.path), "slurm_job_ids": ids})
        return DONE
    click.echo(f"hpcml: chain {run_dir.id} goes on" + (f", {_jobs(ids)}" if ids else ""), err=as_json)
    if queued:
        return wait_for(run_dir, as_json) if wait else DONE
    with follow.from_outside(run_dir) as follower, jobs.quiet_stdout(as_json):
        chain.run_here(run_dir, _say)
        return ended(run_dir, as_json, follower, log_tail=False)


def _jobs(ids: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: job {job_id}" for name, job_id in ids.items()) or "no jobs"


def _say(text: str) -> None:
    click.secho(text, bold=text.startswith("["))


def announce(found: Ready, what: str, told: Sequence[str], *, to_stderr: bool = False) -> None:
    """Say what starts, on which earlier runs it builds, and what was done before the start."""
    click.echo(f"hpcml: {what} · site {found.site.name} ({found.why})", err=to_stderr)
    for name, earlier in found.earlier.items():
        click.echo(f"  {name} is that of {earlier.id.partition('/')[0]}", err=to_stderr)
    for line in [*(f"note: {note}" for note in found.plan.notes), *told]:
        click.echo(f"  {line}", err=to_stderr)


def wait_for(run_dir: RunDir, as_json: bool) -> int:
    """Wait for a queued chain, delivering meanwhile; an interrupted wait leaves the jobs."""
    from ..tracking import follow

    with follow.from_outside(run_dir) as follower:
        try:
            _wait(run_dir)
        except KeyboardInterrupt:
            text = f"no longer waiting; the jobs go on. To cancel them: hpcml cancel {run_dir.id}"
            click.echo(f"\nhpcml: {text}", err=True)
            return INTERRUPTED
        return ended(run_dir, as_json, follower)


def ended(run_dir: RunDir, as_json: bool, follower: "show.Follower", *, log_tail: bool = True) -> int:
    """Do what is left on this side, say how a chain ended, deliver it, and return the exit code."""
    from . import jobs

    with jobs.quiet_stdout(as_json):
        for words in settle(run_dir):
            click.echo(words)
        state = queue.state_of(run_dir)
        click.echo(summary(run_dir, state))
        delivered = show.deliver(run_dir, follower=follower)
        for child in queue.children(run_dir):
            if queue.has_begun(child):
                show.deliver(child, announce=False)
        show.tell_places(run_dir, delivered)
        if log_tail:
            _tell_failure(run_dir)
    if as_json:
        show.echo_json(as_data(run_dir, state))
    if state.name == "CANCELLED" and not rundir.read_json(run_dir.submitted):
        return INTERRUPTED
    return DONE if state.name == "COMPLETED" else JOB_FAILED


def settle(run_dir: RunDir) -> list[str]:
    """Do what is left of a chain on this side; a silent MLflow is said, and leaves it to the next call."""
    try:
        return actions.settle(run_dir, lambda name: click.echo(f"hpcml: {name} …", err=True))
    except ServiceSilent as error:
        click.echo(f"hpcml: not finished: {error}\n  the rest comes with: hpcml sync {run_dir.id}", err=True)
    return []


def _tell_failure(run_dir: RunDir) -> None:
    """The last lines of the log of the step that failed."""
    for child in queue.children(run_dir):
        marker = rundir.read_json(child.status)
        if marker.get("state") not in (None, "COMPLETED") and queue.has_begun(child):
            for path in [path for path in queue.log_paths(child)[::-1] if path.stat().st_size][:1]:
                lines = "\n".join(f"  | {line}" for line in rundir.last_lines(path, 15))
                click.echo(f"last lines of {path}:\n{lines}", err=True)
                return


def as_data(run_dir: RunDir, state: "State") -> dict[str, Any]:
    """Return a chain's state as JSON data, with its steps'."""
    states, _ = queue.states_of(queue.children(run_dir))
    steps = [vars(one) | {"outcome": outcome(RunDir(run_dir.root, one.run_id))} for one in states]
    return vars(state) | {"path": str(run_dir.path), "steps": steps}


def outcome(run_dir: RunDir) -> str:
    """Return what an action did, in words; empty of other runs."""
    return str(rundir.read_json(run_dir.status).get("outcome") or "")


def summary(run_dir: RunDir, state: "State") -> str:
    """Return what a person wants to know of a chain: its state, and a line for each step."""
    took = f" in {show.duration(state.ended - state.started)}" if state.started and state.ended else ""
    lines = [f"{show.state_word(state.name)} {run_dir.id}{took}"]
    if state.reason:
        lines.append(f"  reason    {state.reason}")
    states, silence = queue.states_of(queue.children(run_dir))
    if silence is not None:
        click.echo(f"hpcml: shown as last known: {silence}", err=True)
    width = max((len(_name(one)) for one in states), default=0)
    for one in states:
        word = show.state_word(f"{one.name:<9}")
        lines.append(f"  {_name(one):<{width}}  {word}  {_row(run_dir, one)}".rstrip())
    if state.is_final and (first := next((_name(one) for one in states if one.name != "COMPLETED"), "")):
        plan, verb = rundir.read_json(run_dir.plan), "submit" if rundir.read_json(run_dir.submitted) else "run"
        lines.append(f"  resume    hpcml resume {run_dir.id} goes on with {first}, with the code as it was")
        lines.append(f"  anew      hpcml {verb} {plan.get('job_file')} --from {first}")
    lines.append(f"  files     {run_dir.path}")
    return "\n".join(lines)


def _name(state: "State") -> str:
    return state.run_id.rpartition("/")[2]


def _row(run_dir: RunDir, state: "State") -> str:
    parts = [f"job {state.slurm_job_id}" if state.slurm_job_id else ""]
    if state.started and (state.is_final or state.name == "RUNNING"):
        parts.append(show.duration(max(0.0, (state.ended or time.time()) - state.started)))
    parts.append(outcome(RunDir(run_dir.root, state.run_id)))
    parts.append(state.reason or ("" if state.is_final else state.progress))
    return " · ".join(part for part in parts if part)


def _wait(run_dir: RunDir) -> None:
    """Wait until nothing of a chain is left to the queue: one table of the steps on a terminal, else a line a change."""
    if not sys.stderr.isatty():
        _follow(run_dir, _Lines().tell)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), refresh_per_second=2, transient=True) as live:
        _follow(run_dir, lambda states: live.update(_table(run_dir, states), refresh=True))


def _follow(run_dir: RunDir, tell: "Callable[[list[State]], None]") -> None:
    while True:
        with contextlib.suppress(ServiceSilent):
            state = queue.state_of(run_dir)
            tell(queue.states_of(queue.children(run_dir))[0])
            if state.is_final or state.name == "COMPLETING":
                return
        time.sleep(POLL_S)


class _Lines:
    """Tells each change of each step once."""

    def __init__(self) -> None:
        self.last: dict[str, str] = {}

    def tell(self, states: "list[State]") -> None:
        for state in states:
            parts = [state.name, state.reason, "" if state.is_final else state.progress]
            text = " · ".join(part for part in parts if part)
            if self.last.get(state.run_id) != text and not (state.name == "PENDING" and state.run_id in self.last):
                since = (
                    f" {clock(max(0.0, time.time() - state.since))}" if state.name == "RUNNING" and state.since else ""
                )
                click.echo(f"hpcml: {_name(state)}: {text.replace('RUNNING', f'RUNNING{since}', 1)}", err=True)
            self.last[state.run_id] = text


def _table(run_dir: RunDir, states: "list[State]") -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=run_dir.id, title_justify="left")
    for heading in ("step", "state", ""):
        table.add_column(heading)
    for state in states:
        colour = show.COLOURS.get(state.name, "red")
        table.add_row(_name(state), Text(state.name, colour), Text(_row(run_dir, state)))
    return table
