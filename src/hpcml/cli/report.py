"""The report command."""

import os
from pathlib import Path

import click

from .. import queue, rundir
from ..errors import DONE, HpcmlError, ServiceSilent
from ..slurm.text import ENDED
from . import show
from .root import json_option, site_option


@click.command("report")
@click.argument("run", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Also write the page there.")
@site_option
@json_option
def report_command(run: str | None, output: Path | None, site: str | None, as_json: bool) -> int:
    """Report on a run: figures, curves, advice, as text and as one HTML file.

    RUN is a run id, a Slurm id, or left out for the newest. The page needs no network and opens from disk; the plots
    lie beside it as PNG files.
    """
    from ..report import facts

    found = rundir.find(show.root_of(site), run)
    state, reason = _state(found)
    states = _variants(found)
    collected = facts.collect(found, state=state, reason=reason, states=states)
    if as_json:
        from ..report.advice import advice
        from ..report.causes import likely_cause

        cause = likely_cause(collected)
        told = {"advice": [vars(one) for one in advice(collected)], "likely_cause": vars(cause) if cause else None}
        show.echo_json(collected.to_json() | told)
    else:
        from rich.console import Console

        from ..report import terminal

        terminal.text(collected, Console(highlight=False, width=None if _is_wide() else terminal.WIDTH))
    page = found.report if _is_made(found, state) else _written(found, found.report, state, reason, states)
    if output and page:
        _copy(page, output)
    if not as_json and page:
        click.echo(f"\n  report    {output or page}")
    return DONE


def _state(found: rundir.RunDir) -> tuple[str, str]:
    """The state as Slurm tells it; without an answer the run directory's own word stands."""
    try:
        state = queue.state_of(found)
    except (ServiceSilent, HpcmlError) as error:
        click.echo(f"hpcml: the state is as last known: {str(error).splitlines()[0]}", err=True)
        return "", ""
    return state.name, state.reason


def _variants(found: rundir.RunDir) -> dict[str, tuple[str, str]]:
    """By name the states of a comparison's variants, as far as they are known."""
    if rundir.read_json(found.plan).get("work") != "comparison":
        return {}
    states, _ = queue.states_of(queue.children(found))
    return {state.run_id.rpartition("/")[2]: (state.name, state.reason) for state in states}


def _is_made(found: rundir.RunDir, state: str) -> bool:
    """Whether an ended run's page tells of its end: made anew it would only have another time, and need sending again.

    Without an end marker a page may be one that was made while the run went on; its state is the word that tells.
    """
    from .. import report

    goes_on = state not in {*ENDED, "UNKNOWN", ""}
    if goes_on or not found.report.is_file() or report.is_due(found):
        return False
    is_marked = bool(rundir.read_json(found.status).get("final"))
    return is_marked or (bool(state) and state in found.report.read_text(errors="replace"))


def _is_wide() -> bool:
    return os.isatty(1)


def _written(
    found: rundir.RunDir, path: Path, state: str, reason: str, states: dict[str, tuple[str, str]]
) -> Path | None:
    from .. import report

    try:
        return report.write(found, state=state, reason=reason, states=states)
    except OSError as error:
        raise HpcmlError(
            f"{path} can't be written: {error.strerror}", fix="free space, or -o FILE in a folder that you can write to"
        ) from None


def _copy(page: Path, output: Path) -> None:
    try:
        rundir.write_bytes(output.absolute(), page.read_bytes())
    except OSError as error:
        raise HpcmlError(f"{output} can't be written: {error.strerror}", origin="-o", fix="name another file") from None
