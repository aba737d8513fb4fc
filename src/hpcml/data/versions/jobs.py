"""The version that a job reads: pinned to a hash and laid out on the person's side, found again on a node without Git."""

import dataclasses
import os
import shlex
from pathlib import Path, PurePosixPath

from ... import site as sites
from ...errors import HpcmlError
from ...plan import Plan
from ...slurm import commands
from . import git, material, pointers, receipt, repository
from .dvc import Progress, Say
from .pointers import Pointer
from .receipt import Receipt

ORIGIN = "[data] version"
# What this process has laid out or looked through: the steps of a chain and the variants of a comparison share it.
_whole: set[Path] = set()


def data_root(plan: Plan) -> Path:
    """Return the data folder of a plan's site, here."""
    return sites.data_root(sites.load(plan.site, "the job's site"), Path(plan.project))


def unversioned(plan: Plan) -> Path:
    """Return where a job's data set without a version lies: a folder, or a single file.

    Raises:
        HpcmlError: it isn't there.
    """
    from .. import images

    source = os.path.expanduser(os.path.expandvars(str(plan.data.source)))
    path = Path(plan.project, source) if "/" in source else data_root(plan) / source
    # What isn't there is told by find: what is published where, and where it belongs.
    return path if path.exists() else images.find(str(path) if "/" in source else source)


def pin(plan: Plan) -> Plan:
    """Return a plan that says which content its ``[data] version`` stands for: tags can be moved, a hash can't.

    Raises:
        HpcmlError: no such tag, or no such data set in it.
    """
    if not plan.data.version or plan.data_digest:
        return plan
    return dataclasses.replace(plan, data_digest=_pointer(plan)[1].digest)


def bring(plan: Plan, progress: Progress | None = None, say: Say | None = None) -> Plan:
    """Pin a plan's version and have it laid out, pulled where it isn't yet; on a node of an allocation it must be there.

    Raises:
        HpcmlError: as ``pin``; it can't be pulled; or this is a node, and it isn't there: the command to type elsewhere.
    """
    if not plan.data.version:
        return plan
    found, pointer = _pointer(plan)
    pinned = dataclasses.replace(plan, data_digest=pointer.digest)
    root = data_root(plan)
    if os.environ.get("SLURM_JOB_ID"):
        _need(pinned, root)
        return pinned
    folder = material.folder_of(root, plan.data.version, pointer)
    if folder in _whole:
        return pinned
    if material.lay_out(found, plan.data.version, pointer, root, progress, say) and say:
        say(f"data {plan.data}: {pointer.files:,} files at {folder}")
    _whole.add(folder)
    return pinned


def open_on_node(plan: Plan) -> Plan:
    """Return a plan with its version pinned, for a job that a plain sbatch has started: nothing is pulled on a node.

    Raises:
        HpcmlError: it isn't there, or nobody can tell which one it is; the command to type on the login node.
    """
    if not plan.data.version:
        return plan
    root = data_root(plan)
    try:
        pinned = pin(plan)
    except HpcmlError as error:
        pinned = _by_folders(plan, root, error)
    _need(pinned, root)
    return pinned


def located(plan: Plan, *, verify: bool = True) -> tuple[Path, Receipt]:
    """Return the folder of a plan's version here, and its receipt.

    Args:
        verify: compare names and sizes first.

    Raises:
        HpcmlError: it isn't there, is another one, or not whole.
    """
    pinned = plan if plan.data_digest else open_on_node(plan)
    root = data_root(plan)
    told, folder = _need(pinned, root), _folder(pinned, root)
    if verify:
        receipt.need(folder, told, f"on a login node, in {plan.project}: {command(plan)} --verify")
    return folder, told


def is_there(plan: Plan) -> tuple[Pointer, Path, bool]:
    """Return what a plan's version is, where jobs read it, and whether it is there; nothing is pulled.

    Raises:
        HpcmlError: as ``pin``.
    """
    _, pointer = _pointer(plan)
    root = data_root(plan)
    held = material.held(root, str(plan.data.version), pointer) is not None
    return pointer, material.folder_of(root, str(plan.data.version), pointer), held


def command(plan: Plan) -> str:
    """Return what to type, in the project's folder on a login node, to have a plan's version there."""
    chosen, _ = sites.choose(None, commands.cluster_name())
    site = "" if chosen.name == plan.site else f" --site {shlex.quote(plan.site)}"
    return f"hpcml data version pull {plan.data.version} {shlex.quote(str(plan.data.source))}{site}"


def _pointer(plan: Plan) -> tuple[repository.Repository, Pointer]:
    project, version, source = Path(plan.project), str(plan.data.version), str(plan.data.source)
    try:
        found = repository.find(project)
        if found is None:
            pointers.need_tag(git.find(project), version)
            raise HpcmlError(
                f"{project} has no versions of data", fix=f"hpcml data version add {source} --tag {version}"
            )
        return found, pointers.of(found.git, version, source)
    except HpcmlError as error:
        raise HpcmlError(dataclasses.replace(one, origin=_origin(plan)) for one in error.problems) from None


def _by_folders(plan: Plan, root: Path, error: HpcmlError) -> Plan:
    """Pin a version where Git can't tell, as on a node without it: by what is laid out, where that is one alone."""
    likely = _folder(dataclasses.replace(plan, data_digest="*"), root)
    receipts = [told for path in likely.parent.glob(likely.name) if (told := receipt.read(path))]
    digests = {told.digest for told in receipts if told.tag == plan.data.version}
    if len(digests) != 1:
        raise error
    return dataclasses.replace(plan, data_digest=digests.pop())


def _folder(plan: Plan, root: Path) -> Path:
    name = PurePosixPath(os.path.normpath(str(plan.data.source))).name
    return material.folder_of(root, str(plan.data.version), Pointer(name, plan.data_digest))


def _need(plan: Plan, root: Path) -> Receipt:
    """Return the receipt of a plan's version."""
    folder = _folder(plan, root)
    told = receipt.read(folder)
    fix = f"on a login node, in {plan.project}: {command(plan)}"
    if told is None:
        what = f"{plan.data} ({plan.data_digest[:12]}) is not on {os.uname().nodename}, and nothing is pulled on a node"
        raise HpcmlError(f"{what}: no {folder}", origin=_origin(plan), fix=fix)
    if told.digest != plan.data_digest:
        what = f"{folder} on {os.uname().nodename} is {told.label}, the job is for {plan.data_digest[:12]}"
        raise HpcmlError(what, origin=_origin(plan), fix=fix)
    return told


def _origin(plan: Plan) -> str:
    return plan.origins.get("data.version", ORIGIN)
