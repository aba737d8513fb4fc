"""The command data version remote: where versions are kept, and the key for it."""

import os
import sys
from pathlib import Path

import click

from ..errors import DONE, HpcmlError
from .root import json_option


@click.command("remote")
@click.argument("url", required=False)
@click.option("--endpoint", default="", metavar="URL", help="An S3 server other than Amazon's.")
@click.option(
    "--timeout", "timeout_s", type=click.IntRange(1, 3600), default=None, help="Seconds that S3 may be silent; 30."
)
@click.option(
    "--login",
    is_flag=True,
    help="Keep a key in .dvc/config.local, for you alone: AWS_* where they are set, else asked for.",
)
@json_option
def remote_command(url: str | None, endpoint: str, timeout_s: int | None, login: bool, as_json: bool) -> int:
    """Say where versions are kept: a folder, or s3://BUCKET/PATH. Without URL: show it, and try it.

    A key is taken from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or from where --login keeps it: never from the command
    line, never into git. --login reads two lines, id and secret, where it isn't at a terminal.
    """
    from ..data.versions import remote, repository, s3
    from ..data.versions.progress import say

    found = repository.ready(Path.cwd()) if url else repository.need(Path.cwd())
    changed = False
    if url:
        changed = repository.set_remote(found, url, endpoint, timeout_s or remote.READ_S, say)
    where = remote.read(found.root)
    if where is None:
        raise HpcmlError("no remote is set", fix="hpcml data version remote URL, a folder or s3://BUCKET/PATH")
    if login:
        remote.keep_key(found.root, where.name, _asked_key())
        where = remote.read(found.root) or where
    s3.look(where)
    if as_json:
        from . import show

        show.echo_json(
            {"url": where.url, "endpoint": where.options.get("endpointurl"), "key": where.key_from, "changed": changed}
        )
        return DONE
    at = where.options.get("endpointurl")
    click.echo(f"{where.url}{f' at {at}' if at else ''}{'' if changed or not url else ': set already'}")
    if where.is_s3:
        click.echo(
            f"  key       {f'from {where.key_from}' if where.key_from else 'as the AWS tools find one (~/.aws), else: --login'}"
        )
    return DONE


def _asked_key() -> dict[str, str]:
    """Return a key from AWS_* where it is set, else from a hidden prompt, else from two lines of stdin."""
    from ..data.versions.remote import SECRETS

    given = {part: os.environ[name] for part, name in SECRETS.items() if os.environ.get(name)}
    if {"access_key_id", "secret_access_key"} <= set(given):
        return given
    if sys.stdin.isatty():
        lines = [click.prompt("access key id", err=True), click.prompt("secret access key", hide_input=True, err=True)]
    else:
        lines = sys.stdin.read(65536).split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    if len(lines) not in (2, 3):
        raise HpcmlError("no key given", origin="--login", allowed="two lines: access key id, secret access key")
    return dict(zip(SECRETS, lines, strict=False))
