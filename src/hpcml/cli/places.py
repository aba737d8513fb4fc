"""Commands about places: site, doctor."""

import dataclasses
from pathlib import Path

import click

from .. import site as sites
from ..errors import DONE
from ..slurm import commands
from . import show
from .root import json_option, site_option


@click.group("site")
def site_command() -> None:
    """What this and other clusters offer."""


@site_command.command("list")
@json_option
def list_sites(as_json: bool) -> int:
    """List the known sites; the one that applies here is marked."""
    chosen, why = sites.choose(None, commands.cluster_name())
    known = {name: sites.load(str(path)) for name, path in sites.known().items()}
    if as_json:
        show.echo_json([dataclasses.asdict(site) for site in known.values()])
        return DONE
    for name, site in known.items():
        here = f"  ← here: {why}" if name == chosen.name else ""
        click.echo(f"{'*' if here else ' '} {name:<12} {site.description}{here}")
    return DONE


@site_command.command("show")
@click.argument("name", required=False)
@json_option
def show_site(name: str | None, as_json: bool) -> int:
    """Show a site: its file, or what applies here where NAME is left out."""
    site, why = sites.choose(name, None if name else commands.cluster_name())
    if as_json:
        show.echo_json(dataclasses.asdict(site))
        return DONE
    assert site.path is not None
    click.echo(f"# {site.name}: {why}; {site.path}\n{site.path.read_text().rstrip()}")
    return DONE


@site_command.command("detect")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write it there instead of printing it.")
def detect_site(output: Path | None) -> int:
    """Write a site's TOML from what sinfo tells here."""
    from ..preflight import detect

    text = detect(commands.cluster_name() or "cluster", commands.partitions())
    if output is None:
        click.echo(text, nl=False)
        return DONE
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    click.echo(f"wrote {output}\n  use it: --site {output}, or HPCML_SITE={output}")
    return DONE


@click.command("doctor")
@site_option
@json_option
def doctor_command(site: str | None, as_json: bool) -> int:
    """Look at this machine and environment, and say what is missing and how to get it."""
    from ..preflight import doctor

    return show.findings(doctor(site), as_json)
