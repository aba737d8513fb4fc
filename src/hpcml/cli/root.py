"""The top command: finds subcommands by name and imports only the one that is asked for; errors become exit codes."""

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from .. import __version__
from ..errors import DONE, INTERRUPTED, JOB_FAILED, HpcmlError, Problem, nearest

# name → module below cli, in the order that --help shows.
COMMANDS = {
    "init": "jobs",
    "check": "jobs",
    "render": "jobs",
    "run": "jobs",
    "submit": "jobs",
    "compare": "compare",
    "tune": "tune",
    "status": "runs",
    "logs": "runs",
    "cancel": "runs",
    "resume": "resume",
    "sync": "runs",
    "top": "top",
    "report": "report",
    "model": "model",
    "data": "data",
    "runs": "runs",
    "site": "places",
    "doctor": "places",
}


class LazyGroup(click.Group):
    """A group that finds its commands by name, each ``NAME_command`` in a module below cli, and imports only what is asked for."""

    def __init__(self, *args: Any, modules: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.modules:
            return None
        module = importlib.import_module(f"hpcml.cli.{self.modules[cmd_name]}")
        command = getattr(module, f"{cmd_name}_command")
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.modules and not args[0].startswith("-"):
            fix = nearest(args[0], self.modules) or f"{ctx.command_path} --help"
            raise HpcmlError(f"no command {args[0]!r}", allowed=", ".join(self.modules), fix=fix)
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup, modules=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, message="hpcml %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error in hpcml itself.")
def cli(debug: bool) -> None:
    """Slurm jobs and notebooks on GPU clusters: one job file for laptop and cluster, nothing lost.

    \b
    hpcml run jobs/mnist_mirrored.toml                    here and now
    hpcml submit jobs/mnist_mirrored.toml                 in the queue
    hpcml compare jobs/mnist_{original,mirrored}.toml     fairly, one after the other
    """


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code; no traceback of hpcml's own reaches a person without ``--debug``."""
    try:
        result = cli.main(list(arguments), prog_name="hpcml", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except HpcmlError as error:
        click.echo(f"hpcml: {error}", err=True)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        click.echo(f"hpcml: {_in_our_words(error)}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("hpcml: interrupted", err=True)
        return INTERRUPTED
    except (
        SystemExit
    ):  # commands return their codes; click and rich end so, with 1, when the reader has gone: `… | head`
        return DONE
    except Exception as error:
        if "--debug" in arguments:
            import traceback

            traceback.print_exc()
        else:
            click.echo(
                f"hpcml: internal error: {type(error).__name__}: {error}\n  fix: hpcml --debug … shows where; please report it",
                err=True,
            )
        return JOB_FAILED


def _in_our_words(error: click.ClickException) -> Problem:
    """Return what click has to say of wrong usage in the form of every other error."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    usage = f"{context.command_path} --help" if context else "hpcml --help"
    if isinstance(error, click.NoSuchOption):
        known = context.command.params if context else []
        options = [name for option in known if isinstance(option, click.Option) for name in option.opts]
        return Problem(
            f"no option {error.option_name!r}", allowed=", ".join([*options, "--help"]),
            fix=nearest(error.option_name, options) or usage,
        )  # fmt: skip
    if isinstance(error, click.MissingParameter) and context and error.param:
        name = error.param.human_readable_name if error.param.param_type_name == "argument" else error.param.opts[0]
        words = " ".join(context.command.collect_usage_pieces(context))
        return Problem(f"{name} is missing", fix=f"{context.command_path} {words}; {usage} tells more")
    words = re.sub(r"a valid (float|integer)( range)?$", "a number", error.format_message().rstrip("."))
    return Problem(words[:1].lower() + words[1:], fix=usage)


def site_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--site``."""
    return click.option("--site", metavar="NAME", help="Where: a site's name or its .toml (hpcml site list).")(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def steps_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--step``, ``--from`` and ``--of``."""
    for words in (
        click.option(
            "--of", metavar="RUN", help="Of a chain: the run whose earlier steps count; default: the newest that fits."
        ),
        click.option("--from", "start", metavar="STEP", help="Of a chain: this step and those after it."),
        click.option(
            "--step", "only", metavar="STEP", multiple=True, help="Of a chain: this step alone; may be repeated."
        ),
    ):
        command = words(command)
    return command
