"""``scripts/test`` and ``.ci/run`` in a clone whose tools are stubs: Horovod is built beside the first checks, and demanded by CI."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = """#!/bin/sh
echo "asked: $* (demands $HPCML_TEST_REQUIRE)"
case "$*" in
  *"-m pytest"*) [ -e built ] && echo "==== 3 passed in 1.00s ====" || echo "==== 1 failed in 1.00s ===="; [ -e built ] ;;
esac
"""
INSTALL = """#!/bin/bash
echo "horovod: building for $1" >&2
if [[ -n ${HANGS-} ]]; then echo $$ >building && exec sleep 300; fi
if [[ -n ${FAILS-} ]]; then echo "horovod: error: g++ not found" >&2 && exit 2; fi
touch built
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("scripts/test", "scripts/lib/apt.bash", ".ci/run"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    stubs = {".venv/bin/python": PYTHON, "envs/horovod/install": INSTALL}
    stubs |= dict.fromkeys(("scripts/setup", "scripts/devcluster", ".venv/bin/shellcheck"), "#!/bin/sh\n")
    for name, text in stubs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def play(clone: Path, script: str, **more: str) -> tuple[int, str]:
    done = subprocess.run(
        [str(clone / script)],
        env={**os.environ, "HPCML_TEST_APT": "0", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout


def test_all_is_checked_with_horovod(clone: Path) -> None:
    code, told = play(clone, ".ci/run")
    assert code == 0 and "horovod: building for .venv/bin/python" in told
    (tests,) = [line for line in told.splitlines() if line.startswith("asked: -m pytest")]
    assert tests.endswith("(demands slurm)")
    assert told.splitlines()[-1] == "==== 3 passed in 1.00s ===="


def test_a_horovod_that_cannot_be_built_is_said_at_the_end_and_fails_ci(clone: Path) -> None:
    code, told = play(clone, ".ci/run", FAILS="1")
    assert code == 1 and told.splitlines()[-1] == "==== 1 failed in 1.00s ===="
    said = "test: skipped: the tests of Horovod, which could not be built: g++ not found"
    assert told.index("asked: -m pytest") < told.index(said)


def test_it_can_be_left_out(clone: Path) -> None:
    _, told = play(clone, "scripts/test", HPCML_TEST_HOROVOD="0")
    assert "building" not in told and "asked: -m pytest" in told


def test_the_build_ends_with_what_started_it(clone: Path) -> None:
    (clone / ".venv/bin/python").write_text("#!/bin/sh\nwhile [ ! -s building ]; do :; done\nkill -TERM $PPID\n")
    code, _ = play(clone, "scripts/test", HANGS="1")
    assert code == 128 + signal.SIGTERM
    try:
        building = os.pidfd_open(int((clone / "building").read_text()))
    except ProcessLookupError:
        return
    ended, _, _ = select.select([building], [], [], 10)
    os.close(building)
    assert ended
