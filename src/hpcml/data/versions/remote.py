"""Where versions are pushed to and pulled from: a folder or S3, with its key in the environment or a private local file."""

import configparser
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from ...errors import HpcmlError
from ...rundir import write_bytes
from . import dvc

NAME = "storage"  # of a remote that hpcml sets
# A connection is made or not within this; an answer to a request of a large file's part takes longer.
CONNECT_S, READ_S = 10, 30
SECRETS = {  # DVC's name of each part of a key → the environment's
    "access_key_id": "AWS_ACCESS_KEY_ID",
    "secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "session_token": "AWS_SESSION_TOKEN",
}
_PATHS = {"url", "dir", "keyfile", "credentialpath", "configpath"}  # relative to the file that holds them

Sections = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Remote:
    """DVC's default remote.

    Attributes:
        url: a folder, or ``s3://BUCKET/PATH``.
        options: what else is configured, such as ``endpointurl``; no part of a key.
        key: parts of a key by DVC's names; empty where others find one (``~/.aws``, a role).
        key_from: where the key is kept; empty without one.
    """

    name: str
    url: str
    options: Mapping[str, str] = field(default_factory=dict)
    key: Mapping[str, str] = field(default_factory=dict, repr=False)
    key_from: str = ""

    @property
    def is_s3(self) -> bool:
        """Whether it speaks S3."""
        return self.url.startswith("s3://")


def read(root: Path) -> Remote | None:
    """Return the default remote of a repository of DVC, None where it has none of its own."""
    merged = sections(root)
    name = merged.get("core", {}).get("remote", "")
    options = dict(merged.get(f'remote "{name}"', {}))
    url = options.pop("url", "")
    if not url:
        return None
    kept = {part: options.pop(part) for part in SECRETS if part in options}
    given = {part: os.environ[variable] for part, variable in SECRETS.items() if os.environ.get(variable)}
    # As DVC takes them: what is configured goes before the environment.
    if "secret_access_key" in kept:
        return Remote(name, url, options, kept, str(root / ".dvc" / "config.local"))
    return Remote(name, url, options, given, "the environment" if "secret_access_key" in given else "")


def sections(root: Path, *names: str) -> Sections:
    """Return the sections of DVC's configuration of a repository, paths made absolute; the local file wins.

    Args:
        names: of the files; both by default.
    """
    merged: Sections = {}
    for name in names or ("config", "config.local"):
        for section, options in _load(root / ".dvc" / name).items():
            kept = merged.setdefault(section, {})
            for key, value in options.items():
                relative = key in _PATHS and not re.match(r"\w+://|/|~", value)
                kept[key] = os.path.normpath(root / ".dvc" / value) if relative else value
    return merged


def set_url(root: Path, url: str, endpoint: str = "", read_s: int = READ_S) -> bool:
    """Make a folder or an S3 address the default remote; return whether anything changed.

    Args:
        endpoint: of an S3 server other than Amazon's.
        read_s: how long an S3 server may be silent, in seconds.

    Raises:
        HpcmlError: the address is none, or holds a key.
    """
    _checked(url, endpoint)
    if not url.startswith("s3://"):
        url = os.path.abspath(os.path.expanduser(url))
    wanted = {"url": url}
    if url.startswith("s3://"):
        wanted |= {"connect_timeout": str(CONNECT_S), "read_timeout": str(read_s)}
        wanted |= {"endpointurl": endpoint} if endpoint else {}
    now = read(root)
    name = now.name if now else NAME
    have = {"url": now.url, **now.options} if now else {}
    if not endpoint and "endpointurl" in have and have["url"] != url:
        dvc.run(root, "remote", "modify", "--unset", name, "endpointurl", doing="set the remote")
    if not now:
        dvc.run(root, "remote", "add", "--default", "--force", name, url, doing="set the remote")
        have["url"] = url
    for key, value in wanted.items():
        if have.get(key) != value:
            dvc.run(root, "remote", "modify", name, key, value, doing="set the remote")
    return any(have.get(key) != value for key, value in wanted.items()) or not now


def _checked(url: str, endpoint: str) -> None:
    for given in filter(None, (url, endpoint)):
        if "://" not in given:
            continue
        parts = urlsplit(given)
        if parts.username or parts.password or parts.query:
            what = "an address with a key in it would be kept in git"
            raise HpcmlError(what, fix="leave it out; --login keeps a key in a private file")
    if "://" in url and not re.fullmatch(r"s3://[^/]+(/.*)?", url):
        scheme = url.partition("://")[0]
        raise HpcmlError(f"{scheme}:// is no remote here", allowed="a folder, or s3://BUCKET/PATH")
    if endpoint and not re.fullmatch(r"https?://[^/\s]+/?", endpoint):
        raise HpcmlError(f"{endpoint!r} is no address of a server", origin="--endpoint", allowed="https://HOST[:PORT]")
    if endpoint and not url.startswith("s3://"):
        raise HpcmlError("--endpoint is about S3, and the remote is a folder", allowed="s3://BUCKET/PATH")


def keep_key(root: Path, name: str, key: Mapping[str, str]) -> Path:
    """Keep a key in ``.dvc/config.local``, which nobody else can read and git ignores; return the file.

    Raises:
        HpcmlError: it holds characters that no key has.
    """
    for part, value in key.items():
        if not re.fullmatch(r"[!#-&(-~]+", value):  # printable ASCII, no blanks, no quotes
            raise HpcmlError(f"{SECRETS[part]} holds blanks, quotes or characters beyond ASCII", fix="type it again")
    path = root / ".dvc" / "config.local"
    merged = _load(path)
    options = merged.setdefault(f'remote "{name}"', {})
    for part in SECRETS:
        options.pop(part, None)
    options.update(key)
    write_bytes(path, _text(merged).encode())  # 0600
    return path


def tighten(root: Path) -> None:
    """Take the rights of others off ``.dvc/config.local``: DVC itself writes it for all to read."""
    path = root / ".dvc" / "config.local"
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            path.chmod(mode & 0o700)
    except FileNotFoundError:
        return
    except OSError as error:
        what = f"{path} may be read by others, and may hold a key: {error.strerror}"
        raise HpcmlError(what, fix=f"have its owner run chmod 600 {path}") from None


def scratch(work: Path, root: Path) -> None:
    """Make a folder an empty repository of DVC with the cache and the remote of another, and without Git.

    Its lock is its own. A key stays where it is, by a link, unless that file has paths relative to its place.
    """
    home = work / ".dvc"
    home.mkdir(mode=0o700, parents=True)
    local = root / ".dvc" / "config.local"
    own = sections(root, "config")
    if any(not os.path.isabs(value) and key in _PATHS and "://" not in value
           for options in _load(local).values() for key, value in options.items()):  # fmt: skip
        write_bytes(home / "config.local", _text(sections(root, "config.local")).encode())
    elif local.exists():
        (home / "config.local").symlink_to(local)
    own.setdefault("core", {}).update({"no_scm": "true", "analytics": "false", "check_update": "false"})
    own.setdefault("cache", {}).setdefault("dir", str(root / ".dvc" / "cache"))
    own["cache"]["type"] = "reflink,hardlink,copy"
    write_bytes(home / "config", _text(own).encode())


def cache_of(root: Path) -> Path:
    """Return the folder of DVC's cache."""
    return Path(sections(root).get("cache", {}).get("dir", root / ".dvc" / "cache")).expanduser()


def _load(path: Path) -> Sections:
    """Return a configuration's sections (ConfigObj's format, of which DVC writes the part that INI files share)."""
    parser = configparser.ConfigParser(
        interpolation=None, strict=False, delimiters=("=",), inline_comment_prefixes=None
    )
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        # An error of the parser quotes the line, and the line may hold a key.
        why = error.strerror if isinstance(error, OSError) else "it is no configuration"
        raise HpcmlError(f"{path} can't be read: {why}", fix="mend it, or move it away") from None
    return {name.strip("'"): {key: _bare(value) for key, value in parser[name].items()} for name in parser.sections()}


def _bare(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value


def _text(sections: Mapping[str, Mapping[str, str]]) -> str:
    lines = []
    for name, options in sections.items():
        lines.append(f"['{name}']" if '"' in name else f"[{name}]")
        lines += [f'    {key} = "{value}"' for key, value in options.items()]
    return "\n".join(lines) + "\n"
