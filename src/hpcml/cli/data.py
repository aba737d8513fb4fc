"""Commands about data sets: data fetch, pack, version, …; each is imported when it is asked for."""

import click

from .root import LazyGroup

# name → module below cli, in the order that --help shows.
COMMANDS: dict[str, str] = {
    "pack": "data_pack",
    "unpack": "data_pack",
    "verify": "data_pack",
    "ls": "data_pack",
    "cat": "data_pack",
    "fetch": "data_fetch",
    "stage": "data_fetch",
    "bench": "data_fetch",
    "version": "data_version",
}


@click.group("data", cls=LazyGroup, modules=COMMANDS)
def data_command() -> None:
    """Fetch data sets, keep their versions, and pack many small files into few large ones."""
