"""Commands about trained models: model register, promote, list, predict."""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .. import rundir
from .. import site as sites
from ..errors import DONE, HpcmlError
from . import show
from .root import json_option, site_option

if TYPE_CHECKING:
    from ..tracking.registry import Version

SHOWN = ("val_accuracy", "accuracy", "val_loss", "loss")


@click.group("model")
def model_command() -> None:
    """Register, promote, list and use the models that runs have saved.

    \b
    hpcml model register RUN            a version, from what `run.log_model` saved
    hpcml model promote mnist 3         mnist@champion is version 3 from now on
    hpcml model predict mnist x.npy     what it says to the rows of a file
    """


@model_command.command("register")
@click.argument("run", required=False)
@click.option("--name", help="The registered model; by default the run's experiment.")
@site_option
@json_option
def register_model(run: str | None, name: str | None, site: str | None, as_json: bool) -> int:
    """Make a version of a registered model from a delivered run's model.

    RUN is a run id, a Slurm id, or left out for the newest. Registered twice, it is the same version.
    """
    found = rundir.find(show.root_of(site), run)
    from ..tracking import mlflow, registry

    plan = rundir.read_json(found.plan)
    uri = mlflow.store_uri(sites.load(site or plan["site"]), Path(plan["project"]))
    version, is_new = registry.register(found, uri, name)
    if as_json:
        show.echo_json(vars(version) | {"new": is_new})
    else:
        click.echo(f"{version} {'is' if is_new else 'was already'} the model of {found.id}")
        click.echo(f"  promote it: hpcml model promote {version.name} {version.version}")
    return DONE


@model_command.command("promote")
@click.argument("name")
@click.argument("version", type=click.IntRange(min=1))
@click.option("--alias", default="champion", show_default=True, help="The name to give to that version.")
@site_option
def promote_model(name: str, version: int, alias: str, site: str | None) -> int:
    """Let an alias point to a version of a model."""
    uri, root = _store(site)
    from ..tracking import registry

    promoted, before = registry.promote(uri, root, name, version, alias)
    click.echo(f"{name}@{alias} is version {promoted.version}" + (f", was {before}" if before else ""))
    return DONE


@model_command.command("list")
@click.argument("name", required=False)
@site_option
@json_option
def list_models(name: str | None, site: str | None, as_json: bool) -> int:
    """List the versions of a model, or of all, with their aliases, runs and metrics."""
    uri, root = _store(site)
    from ..tracking import registry

    found = registry.versions(uri, root, name)
    if as_json:
        show.echo_json([vars(version) for version in found])
    elif not found:
        click.echo(f"no versions of {name} yet" if name else "no models yet: hpcml model register RUN")
    else:
        _print(found)
    return DONE


@model_command.command("predict")
@click.argument("model")
@click.argument("input", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="A .csv, .npy, .npz or .json; else CSV is printed."
)
@click.option("--array", metavar="NAME", help="Which array of an .npz that holds several.")
@site_option
def predict_model(model: str, input: Path, output: Path | None, array: str | None, site: str | None) -> int:
    """Load a model again and print what it says to each row of a file.

    MODEL is NAME (its champion, else the newest version), NAME@ALIAS, NAME/VERSION, or a run id, whose own folder is
    then used without MLflow. INPUT is a .npy, .npz, .csv or .json.
    """
    from ..tracking import inference, models, registry

    data = inference.read(input, array)
    root = show.root_of(site)
    with tempfile.TemporaryDirectory(prefix="hpcml-") as scratch:
        run = _run(root, model)
        if run:
            folder, told = run.model, f"run {run.id}"
            if not (folder / models.DESCRIPTION).is_file():
                raise HpcmlError(
                    f"run {run.id} has no model", fix="save one in the work: run.log_model(model, example=x[:5])"
                )
        else:
            uri, root = _store(site)
            folder, version = registry.fetch(uri, root, model, Path(scratch))
            told = f"{version}" + (f" ({', '.join(version.aliases)})" if version.aliases else "")
        click.echo(f"hpcml: predicting with {told}", err=True)
        loaded = models.load(folder)
        predictions = inference.predict(loaded, inference.fit(data, loaded.metadata.get_input_schema(), str(input)))
    if output:
        inference.write(predictions, output)
        click.echo(f"hpcml: wrote {output}", err=True)
    else:
        for line in inference.lines(predictions):
            click.echo(line)
    return DONE


def _store(site: str | None) -> tuple[str, Path]:
    """Return MLflow's address and the runs folder that apply here."""
    from ..job import project_of
    from ..slurm import commands
    from ..tracking import mlflow

    where, _ = sites.choose(site, None if site else commands.cluster_name())
    project = project_of(Path.cwd() / "job.toml")
    return mlflow.store_uri(where, project), rundir.runs_root(where, project)


def _run(root: Path, reference: str) -> rundir.RunDir | None:
    """Return the run with this id; None where there is none: a model's name then."""
    words = reference.split("/")
    if len(words) > 2 or {"", ".", ".."} & set(words):
        return None
    run = rundir.RunDir(root, reference)
    return run if run.plan.is_file() else None


def _print(found: "list[Version]") -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    metrics = [name for name in SHOWN if any(name in version.metrics for version in found)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("model", "version", "aliases", *metrics, "registered", "run"):
        table.add_column(heading, justify="right" if heading in ("version", *metrics) else "left")
    for version in found:
        values = [f"{version.metrics[name]:.4g}" if name in version.metrics else "" for name in metrics]
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(version.created))
        words = (version.name, str(version.version), ", ".join(version.aliases), *values, when, version.run)
        table.add_row(*map(escape, words))
    Console().print(table)
