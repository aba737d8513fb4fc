"""MLflow's store as deliveries see it: an address without secrets, one writer at a time, an answer in bounded time."""

import contextlib
import fcntl
import logging
import os
import re
import shlex
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit, urlunsplit

from ..errors import HpcmlError, ServiceSilent
from . import deadline

ANSWER_S = 5  # a server that gives no first answer in this time is silent; MLflow's own defaults make it 247 s
CALL_S = 20  # any later call, unless MLFLOW_HTTP_REQUEST_TIMEOUT is set
LOCK_WAIT_S = 60  # for another delivery to the same store
LOCK_TELL_S = 2
_OTHER = "set MLFLOW_TRACKING_URI, or the site's `tracking`, to another file"
LOGIN = (
    "the credentials are wrong or missing: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or "
    "MLFLOW_TRACKING_TOKEN), then hpcml sync; nothing is lost: the run directory has it all"
)
# The packages of the drivers that SQLAlchemy imports by these names.
DRIVERS = {
    "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
    "pymysql": "PyMySQL",
    "pyodbc": "pyodbc",
}
LATER = "nothing is lost: the run directory has it all; `hpcml sync` delivers it later"

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
LOUD_LOGGERS = ("mlflow", "alembic", "sqlalchemy", "urllib3")


@dataclass(frozen=True)
class Address:
    """Where MLflow is.

    Attributes:
        uri: for MLflow.
        shown: for people and files: without credentials.
        database: the file of a SQLite store.
        env: credentials as MLflow's variables.
        secrets: what no message may show.
    """

    uri: str
    shown: str
    database: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()

    @property
    def artifact_root(self) -> Path | None:
        """Folder for the artifacts of a SQLite store, beside its file; a server has its own."""
        return self.database.parent / "mlartifacts" if self.database else None


@dataclass(frozen=True)
class Store:
    """An open store: MLflow's client and its address."""

    client: Any
    address: Address


def parse(uri: str) -> Address:
    """Take an address apart; a server's credentials go into variables, so that no message of anybody's shows them.

    Raises:
        HpcmlError: a folder, which MLflow no longer takes, or no address at all.
    """
    scheme = uri.partition(":")[0].partition("+")[0]
    allowed, fix = "sqlite:///FILE, http://HOST:PORT", "set MLFLOW_TRACKING_URI, or the site's `tracking`"
    if scheme == "file" or ("://" not in uri and not uri.startswith(("sqlite:", "databricks", "uc:"))):
        is_folder = scheme == "file" or os.sep in uri or os.path.isdir(uri)
        what = f"MLflow keeps no runs in a folder: {uri}" if is_folder else f"{uri!r} is no address of MLflow"
        raise HpcmlError(what, allowed=allowed, fix=fix)
    if scheme == "sqlite":
        name = uri.partition("///")[2].partition("?")[0]
        if not name or name.startswith((":memory:", "file:")):
            return Address(uri, uri)
        database = Path(unquote(name)).absolute()  # SQLAlchemy 2.1 decodes it too
        return Address(uri, f"sqlite:///{database}", database)
    try:
        parts = urlsplit(uri)
    except ValueError as error:  # not shown: it may hold a password
        raise HpcmlError(f"MLflow's address is not valid: {error}", allowed=allowed, fix=fix) from None
    login, _, host = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    bare = parts._replace(netloc=host)
    shown = urlunsplit(bare._replace(query="", fragment=""))
    if scheme in ("http", "https"):
        env = {"MLFLOW_TRACKING_USERNAME": unquote(user), "MLFLOW_TRACKING_PASSWORD": unquote(password)}
        return Address(urlunsplit(bare), shown, env=env if login else {})
    secrets = (password, unquote(password), *parse_qs(parts.query).get("password", ()))
    return Address(uri, shown, secrets=tuple(filter(None, secrets)))


def check_typed(uri: str) -> None:
    """Refuse an address that a person mistyped, before anything is made of it.

    Raises:
        HpcmlError: no address, a folder, another file than a database, or a folder below none.
    """
    database = parse(uri).database
    if database is not None and not database.parent.parent.is_dir():
        raise HpcmlError(
            f"there is no folder {database.parent} for MLflow's database", origin="MLFLOW_TRACKING_URI",
            fix=f"mkdir -p {shlex.quote(str(database.parent))}, or correct the address",
        )  # fmt: skip
    _check_file(database)


def _check_file(database: Path | None) -> None:
    """Refuse another file than a SQLite database; an absent or empty one becomes one."""
    if database is None or not database.exists():
        return
    try:
        with database.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise HpcmlError(f"{database} can't be read: {error.strerror}", fix=_OTHER) from None
    if head not in (b"", b"SQLite format 3\0"):  # https://www.sqlite.org/fileformat.html#the_database_header
        raise HpcmlError(f"{database} is not a database", allowed="sqlite:///FILE of MLflow's", fix=_OTHER)


@contextlib.contextmanager
def opened(address: Address, lock: Path, what: str) -> Iterator[Store]:
    """Yield the store once it has answered, locked against other deliveries.

    Args:
        address: of the store.
        lock: file to lock where the store has none of its own, which a SQLite store has, beside its file.
        what: the run that is delivered, for messages.

    Raises:
        ServiceSilent: the store gives no answer, refuses, or stays locked; also in the midst of the work.
        HpcmlError: MLflow or a driver is not installed, its variables hold no numbers, the file is no database, or no
            file can be made beside it.
    """
    _check_file(address.database)
    settings = {**QUIET, **_patience(), **address.env}
    if address.database:
        lock = address.database.with_name(address.database.name + ".lock")
        settings["MLFLOW_SQLALCHEMYSTORE_POOLCLASS"] = "NullPool"  # closes the file after each use
    with environment(settings), warnings.catch_warnings(action="ignore"):
        errors = _service_errors()
        try:
            with silenced(), deadline.bounded(), _locked(lock, address):
                yield Store(_client(address), address)
        except errors as error:
            words = re.sub(r"\s+", " ", str(error) or type(error).__name__)
            for secret in address.secrets:
                words = words.replace(secret, "***")
            words = textwrap.shorten(words, 600, placeholder=" …")
            fix = LOGIN if _code_of(error) in (401, 403) else LATER
            raise ServiceSilent(f"MLflow at {address.shown} did not take {what}: {words}", fix=fix) from None
        except ImportError as error:
            package = DRIVERS.get(error.name or "", error.name or "what it names")
            fix = f"pip install {shlex.quote(package)}"
            raise HpcmlError(f"MLflow at {address.shown} needs a package: {error}", fix=fix) from None


def _code_of(error: Exception) -> int | None:
    """The HTTP status that a server answered with, as MLflow or requests tells it; None where none did."""
    told = getattr(getattr(error, "response", None), "status_code", None)
    if told is None and (ask := getattr(error, "get_http_status_code", None)):
        told = ask()
    return told if isinstance(told, int) else None


def _patience() -> dict[str, str]:
    """Return how long MLflow waits for a server: as the user set it, else shorter than its own defaults."""
    defaults = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(CALL_S), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    chosen = {name: os.environ.get(name, default) for name, default in defaults.items()}
    for name, value in chosen.items():
        if not value.strip().isdecimal():
            raise HpcmlError(f"{name}={value!r} is no number", allowed="a whole number", fix=f"unset {name}")
    return chosen


def _service_errors() -> tuple[type[Exception], ...]:
    try:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise HpcmlError(f"MLflow is not installed here: {error}", fix="pip install 'hpcml[mlflow]'") from None
    return (MlflowException, SQLAlchemyError, OSError)


def _client(address: Address) -> Any:
    """Return MLflow's client once the store has answered."""
    from mlflow import MlflowClient

    if address.database and address.artifact_root:
        _make(address.database, address.uri)
        address.artifact_root.mkdir(mode=0o700, exist_ok=True)
    client = MlflowClient(tracking_uri=address.uri)
    with environment({"MLFLOW_HTTP_REQUEST_TIMEOUT": str(ANSWER_S), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}):
        client.search_experiments(max_results=1)
    return client


def _make(database: Path, uri: str) -> None:
    """Make a database whole or not at all: MLflow takes seconds and dozens of steps, and could not open one half made."""
    from mlflow import MlflowClient

    if database.exists() and database.stat().st_size:
        return
    for left in database.parent.glob(f"{database.name}.*.new"):
        left.unlink(missing_ok=True)
    mark = f".{os.getpid()}.new"
    fresh = database.with_name(database.name + mark)
    # Logs and notebooks are as private here as in the run directory.
    os.close(os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    # Written as it was given: MLflow makes the folder that an address names, encoded or not.
    MlflowClient(tracking_uri=uri.partition("?")[0] + mark).search_experiments(max_results=1)
    os.replace(fresh, database)


@contextlib.contextmanager
def _locked(path: Path, address: Address) -> Iterator[None]:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        what = f"no lock for deliveries can be made in {path.parent}: {error.strerror or error}"
        raise HpcmlError(what, fix="free space there, or make it writable; then hpcml sync") from None
    try:
        start, told = time.monotonic(), False
        while not _flock(handle):
            waited = time.monotonic() - start
            if waited > LOCK_WAIT_S:
                what = f"another delivery to MLflow at {address.shown} has held {path} for over {LOCK_WAIT_S} s"
                raise ServiceSilent(what, fix=LATER)
            if waited > LOCK_TELL_S and not told:
                told = True
                print(f"hpcml: waiting for another delivery to MLflow at {address.shown}", file=sys.stderr, flush=True)
            time.sleep(0.05)
        yield
    finally:
        os.close(handle)


def _flock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks (Lustre mounted without flock): the database's own must do
        return True
    return True


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables meanwhile."""
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Silence MLflow's loggers meanwhile: what matters of theirs arrives as an exception."""
    loggers = [logging.getLogger(name) for name in LOUD_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
