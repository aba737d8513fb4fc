"""Registered models: a version from a delivered run, promoted by alias, found and fetched again.

Source of the rules: MLflow's documentation, "ML Model Registry". A version's artifacts are those of its MLflow run, so
that nothing is copied; the tag ``hpcml.run`` leads from a version to the run directory.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import rundir
from ..errors import HpcmlError, ServiceSilent, nearest
from ..rundir import RunDir, read_json
from . import store
from .models import DESCRIPTION
from .store import Store
from .translate import RUN_TAG

DIGEST_TAG = "hpcml.model"
CHAMPION = "champion"
# MLflow writes it into a model's folder when the model is loaded by its name.
META_FILE = "registered_model_meta"
_REFERENCE = re.compile(r"(?P<name>[^@/:]+)(?:@(?P<alias>[^@/:]+)|/(?P<version>\d+))?")


@dataclass(frozen=True)
class Version:
    """One version of a registered model.

    Attributes:
        aliases: the names that point to it.
        run: hpcml's id of the run that trained it; empty where something else registered it.
        mlflow_run: MLflow's id of that run.
        created: when it was registered, in seconds since the epoch.
        metrics: the run's last values.
    """

    name: str
    version: int
    aliases: tuple[str, ...] = ()
    run: str = ""
    mlflow_run: str = ""
    created: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


def register(run: RunDir, uri: str, name: str | None = None) -> tuple[Version, bool]:
    """Make a version of a registered model from a delivered run; the same model again gives the same version.

    Args:
        run: a run whose work has saved a model.
        uri: MLflow's address.
        name: of the registered model; by default the run's experiment.

    Returns:
        The version, and whether it is new.

    Raises:
        HpcmlError: the run has no model, or MLflow has not all of it yet; MLflow does not take the name.
        ServiceSilent: MLflow gives no answer.
    """
    folder = run.model
    if not (folder / DESCRIPTION).is_file():
        having = [child.id for child in rundir.children(run) if (child.model / DESCRIPTION).is_file()]
        fix = "save one in the work: run.log_model(model, example=x[:5])"
        raise HpcmlError(f"run {run.id} has no model", allowed=", ".join(having), fix=fix if not having else "name one")
    plan, noted = read_json(run.plan), read_json(run.delivered)
    name = name or str(plan.get("experiment") or plan.get("name")).replace("/", "-").replace(":", "-")
    with _opened(uri, run.root, f"model {name!r}") as to:
        mlflow_run = _delivered(to, run, folder, noted)
        digest = _digest(folder)
        _make(to, name)
        for found in to.client.search_model_versions(_named(name)):
            if found.run_id == mlflow_run.info.run_id and found.tags.get(DIGEST_TAG) == digest:
                return _version(to, found, _aliases(to, name)), False
        source = f"{mlflow_run.info.artifact_uri}/{run.model.name}"
        tags = {RUN_TAG: run.id, DIGEST_TAG: digest}
        made = to.client.create_model_version(name, source, run_id=mlflow_run.info.run_id, tags=tags)
        return _version(to, made, {}), True


def promote(uri: str, root: Path, name: str, version: int, alias: str = CHAMPION) -> tuple[Version, int | None]:
    """Let an alias point to a version, and return the version and the one that the alias pointed to before.

    Raises:
        HpcmlError: no such model or version; MLflow does not take the alias.
        ServiceSilent: MLflow gives no answer.
    """
    with _opened(uri, root, f"alias {alias!r}") as to:
        aliases = _aliases(to, name)
        found = _by_number(to, name, version)
        with _refused(f"alias {alias!r}", "letters, digits, - and _; not `latest`, nor v and digits"):
            to.client.set_registered_model_alias(name, alias, str(version))
        before = aliases.get(alias)
        return _version(to, found, {**aliases, alias: version}), before if before != version else None


def versions(uri: str, root: Path, name: str | None = None) -> list[Version]:
    """Return the versions of one model, or of all, by name, the newest first.

    Raises:
        HpcmlError: no such model.
        ServiceSilent: MLflow gives no answer.
    """
    with _opened(uri, root, "a question for models") as to:
        names = [name] if name else sorted(model.name for model in _models(to))
        found = list[Version]()
        for each in names:
            aliases = _aliases(to, each)
            listed = to.client.search_model_versions(_named(each))
            found += [_version(to, one, aliases) for one in sorted(listed, key=lambda v: -int(v.version))]
        return found


def fetch(uri: str, root: Path, reference: str, into: Path) -> tuple[Path, Version]:
    """Return a version's folder on this machine, downloaded where it lies elsewhere.

    Args:
        reference: ``NAME`` (its ``champion``, else its newest version), ``NAME@ALIAS`` or ``NAME/VERSION``.
        into: a folder for the download.

    Raises:
        HpcmlError: no such model, alias or version, or its files are gone.
        ServiceSilent: MLflow gives no answer.
    """
    match = _REFERENCE.fullmatch(reference)
    if not match:
        raise HpcmlError(f"{reference!r} names no model", allowed="NAME, NAME@ALIAS, NAME/VERSION, a run id")
    name, alias = match["name"], match["alias"]
    with _opened(uri, root, f"a question for model {name!r}") as to:
        aliases = _aliases(to, name)
        if match["version"]:
            number = int(match["version"])
        elif alias or CHAMPION in aliases:
            number = _pointed_to(name, alias or CHAMPION, aliases)
        else:
            listed = to.client.search_model_versions(_named(name))
            number = max((int(one.version) for one in listed), default=0)
        found = _by_number(to, name, number)
        version = _version(to, found, aliases)
        place = str(to.client.get_model_version_download_uri(name, str(number)))
        folder = _downloaded(place, to, into, version)
        _check(folder, str(found.tags.get(DIGEST_TAG, "")), version)
        return folder, version


def _downloaded(place: str, to: Store, into: Path, version: Version) -> Path:
    from mlflow.artifacts import download_artifacts
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    if is_local_uri(place):  # on this machine already; MLflow's own download would write into it
        folder = Path(local_file_uri_to_path(place))
    else:
        folder = Path(download_artifacts(artifact_uri=place, dst_path=str(into), tracking_uri=to.address.uri))
    if not (folder / DESCRIPTION).is_file():
        fix = f"deliver and register the run again: hpcml sync {version.run}" if version.run else "register it again"
        raise HpcmlError(f"the files of {version} are gone from {place}", fix=fix)
    return folder


def _check(folder: Path, digest: str, version: Version) -> None:
    """A version's files lie in its run, where a later delivery of the run may overwrite them."""
    if digest and _digest(folder) != digest:
        raise HpcmlError(
            f"the files of {version} are not those that were registered: its run saved another model since",
            fix=f"hpcml model register {version.run}",
        )


@contextlib.contextmanager
def _opened(uri: str, root: Path, what: str) -> Iterator[Store]:
    try:
        with store.opened(store.parse(uri), root / ".models.lock", what) as opened:
            yield opened
    except ServiceSilent as error:
        raise ServiceSilent(
            error.problems[0].what, fix="try again once it answers; MLFLOW_TRACKING_URI names another"
        ) from None


@contextlib.contextmanager
def _refused(what: str, allowed: str) -> Iterator[None]:
    """Turn MLflow's refusal of a name into an error of the person's input."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise HpcmlError(f"MLflow does not take {what}: {error.message}", allowed=allowed) from None


def _delivered(to: Store, run: RunDir, folder: Path, noted: Mapping[str, Any]) -> Any:
    """Return the MLflow run once it has all files of the model."""
    from mlflow.exceptions import MlflowException

    late = HpcmlError(f"MLflow at {to.address.shown} has not all of run {run.id}", fix=f"hpcml sync {run.id}")
    if noted.get("uri") != to.address.shown or not isinstance(noted.get("run_id"), str):
        raise late
    try:
        found = to.client.get_run(noted["run_id"])
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise late from None
        raise
    there, sent = dict(_listed(to, noted["run_id"], run.model.name)), noted.get("artifacts") or {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        key, now = str(path.relative_to(run.path)), path.stat()
        if sent.get(key) != [now.st_mtime_ns, now.st_size] or there.get(key) != now.st_size:
            raise late
    return found


def _listed(to: Store, run_id: str, folder: str) -> Iterator[tuple[str, int]]:
    for entry in to.client.list_artifacts(run_id, folder):
        if entry.is_dir:
            yield from _listed(to, run_id, entry.path)
        else:
            yield entry.path, entry.file_size


def _digest(folder: Path) -> str:
    """Return what tells this model's files from another's that the same run saved."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != META_FILE):
        digest.update(f"{path.relative_to(folder)}\0".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _make(to: Store, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        with _refused(f"the name {name!r}", "any text without / and :"):
            to.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _models(to: Store) -> Iterator[Any]:
    token = None
    while token is None or token:
        page = to.client.search_registered_models(page_token=token)
        yield from page
        token = page.token or ""


def _aliases(to: Store, name: str) -> dict[str, int]:
    """Return a model's aliases; an unknown name is an error that tells the nearest."""
    from mlflow.exceptions import MlflowException

    try:
        with _refused(f"the name {name!r}", "any text without / and :"):
            found = to.client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = sorted(model.name for model in _models(to))
        fix = nearest(name, known) or "hpcml model register RUN"
        raise HpcmlError(f"no model {name!r} in {to.address.shown}", allowed=", ".join(known[:10]), fix=fix) from None
    return {alias: int(version) for alias, version in found.aliases.items()}


def _pointed_to(name: str, alias: str, aliases: Mapping[str, int]) -> int:
    if alias not in aliases:
        fix = nearest(alias, aliases) or f"hpcml model promote {name} VERSION --alias {alias}"
        raise HpcmlError(f"model {name!r} has no alias {alias!r}", allowed=", ".join(sorted(aliases)), fix=fix)
    return aliases[alias]


def _by_number(to: Store, name: str, version: int) -> Any:
    listed = {int(one.version): one for one in to.client.search_model_versions(_named(name))}
    if version not in listed:
        there = ", ".join(map(str, sorted(listed)))
        fix = f"hpcml model list {name}" if listed else "hpcml model register RUN"
        raise HpcmlError(f"model {name!r} has no version {version or ''}".rstrip(), allowed=there, fix=fix)
    return listed[version]


def _version(to: Store, found: Any, aliases: Mapping[str, int]) -> Version:
    from mlflow.exceptions import MlflowException

    metrics: dict[str, float] = {}
    with contextlib.suppress(MlflowException):  # the run may be deleted
        metrics = dict(to.client.get_run(found.run_id).data.metrics) if found.run_id else {}
    number = int(found.version)
    mine = tuple(sorted(alias for alias, version in aliases.items() if version == number))
    run, when = found.tags.get(RUN_TAG, ""), found.creation_timestamp / 1000
    return Version(found.name, number, mine, run, found.run_id or "", when, metrics)


def _named(name: str) -> str:
    quote = '"' if "'" in name else "'"  # MLflow's filters know no escapes
    return f"name={quote}{name}{quote}"
