"""The notebook engine with real kernels: what reaches the log, the output notebook, the journal and the exit code."""

import asyncio
import io
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from hpcml import rundir
from hpcml.errors import HpcmlError, JobFailed
from hpcml.notebook import execute as module
from hpcml.notebook import live, running
from hpcml.notebook.execute import execute, main
from hpcml.notebook.kernel import Specs
from hpcml.notebook.live import Log, Output, joined, settled
from hpcml.rundir import RunDir
from hpcml.tracking import journal as journals

PYTHON3 = {"name": "python3", "display_name": "Python 3", "language": "python"}


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    """main() takes over SIGTERM, as in a process of its own."""
    previous = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's temporary folder, to be found empty afterwards."""
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def notebook(path: Path, *cells: Any, kernelspec: dict[str, str] | None = PYTHON3) -> Path:
    """Write a notebook: text is a code cell, ``(tag, text)`` a tagged one, ``("#", text)`` markdown."""
    made = []
    for cell in cells:
        tag, text = cell if isinstance(cell, tuple) else ("", cell)
        metadata = {"tags": [tag]} if tag else {}
        made.append(new_markdown_cell(text) if tag == "#" else new_code_cell(text, metadata=metadata))
    nbformat.write(new_notebook(cells=made, metadata={"kernelspec": kernelspec} if kernelspec else {}), path)
    return path


def outputs(path: Path) -> str:
    """Return everything an executed notebook's cells put out, as JSON text."""
    return json.dumps([cell.get("outputs", []) for cell in json.loads(path.read_text())["cells"]])


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


# --- a run that ends well ------------------------------------------------------------------------------------------


def test_cells_run_in_order_with_log_journal_and_output(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # where it is set, ipykernel leaves a library's output alone
    source = notebook(
        tmp_path / "in.ipynb",
        ("#", "# Title\n\n## Load *data* ##"),
        "x = 20\nprint('loaded')",
        ("#", "just words"),
        "# Twice\nprint('part', end='')\nx * 2 + 2",
        "",
        ("skip-execution", "1/0"),
        "# Native\nimport os, sys, time\nos.write(2, b'from a library\\n')\n"
        "while os.fstat(sys.stderr.fileno()).st_size == 0: time.sleep(0.01)  # until ipykernel has passed it on\n"
        f"import atexit; left = open({str(tmp_path / 'left')!r}, 'w'); atexit.register(left.write, 'at exit');",
    )
    run = RunDir(tmp_path, "run").make()
    place = ["--run-root", str(tmp_path), "--run-id", "run", "--rank", "1", "--restart", "2"]
    assert main([str(source), str(run.notebook(1)), *place]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        "[cell 1/3] Load *data*",
        "loaded",
        "[cell 2/3] Twice",
        "part",
        "42",
        "[cell 3/3] Native",
        "from a library",  # once
    ]
    assert err == ""
    records = [(r["done"], r["total"], r["unit"], r["text"]) for r in journals.read(run.events)]
    assert records[:2] == [(0, 3, "cell", "Load *data*"), (1, 3, "cell", "Twice")]
    assert records[-1][:2] == (3, 3)
    assert run.event_file(1, 2, "engine").exists()
    done = json.loads(run.notebook(1).read_text())
    assert done["cells"][3]["outputs"][-1]["data"]["text/plain"] == ["42"]
    assert done["metadata"]["papermill"]["exception"] is None
    assert done["metadata"]["papermill"]["input_path"] == str(source)
    assert run.notebook(1).stat().st_mode & 0o777 == 0o600
    assert [p.name for p in run.path.iterdir() if p.name.startswith(".")] == []
    assert (tmp_path / "left").read_text() == "at exit"  # the kernel was asked to leave, not killed
    assert list(temporary.iterdir()) == []


def test_kernel_has_no_ports_no_history_and_the_given_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    work = tmp_path / "work folder"
    work.mkdir()
    probe = """
import json, os, sys
path = sys.argv[sys.argv.index("-f") + 1]
info = json.load(open(path))
history = get_ipython().history_manager
print("PROBE", json.dumps({
    "transport": info["transport"], "modes": [os.stat(p).st_mode & 0o777 for p in (path, os.path.dirname(path))],
    "longest": max(len(f"{info['ip']}-{n}".encode()) for n in range(1, 6)), "folder": os.path.dirname(path),
    "sockets": len([n for n in os.listdir(os.path.dirname(path)) if n.startswith(os.path.basename(info["ip"]) + "-")]),
    "history": [history.enabled, history.hist_file], "cwd": os.getcwd(),
}))"""
    source = notebook(tmp_path / "in.ipynb", probe, "raise RuntimeError('clean up after this, too')")
    with pytest.raises(JobFailed):
        execute(source, tmp_path / "out.ipynb", {}, cwd=work)
    line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("PROBE"))
    found = json.loads(line.removeprefix("PROBE "))
    assert found["transport"] == "ipc" and found["sockets"] == 5
    assert found["modes"] == [0o600, 0o700]
    assert found["longest"] < 108
    assert found["history"] == [False, ":memory:"]
    assert found["cwd"] == str(work)
    assert not Path(found["folder"]).exists() and list(deep.iterdir()) == []


def test_partial_output_is_saved_while_a_cell_runs_and_never_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag, output = tmp_path / "flag", tmp_path / "out.ipynb"
    source = notebook(
        tmp_path / "in.ipynb",
        "import os, time\n"
        "for n in range(3000): print('line', n, flush=True)\n"
        "end = time.monotonic() + 120\n"
        f"while not os.path.exists({str(flag)!r}):\n"
        "    assert time.monotonic() < end, 'nobody saw the output'\n"
        "    time.sleep(0.01)\n",
    )
    broken: list[str] = []
    writes: list[float] = []
    write = rundir.write_bytes
    monkeypatch.setattr(
        rundir, "write_bytes", lambda path, content: (writes.append(time.monotonic()), write(path, content))
    )

    def read_until_seen() -> None:
        while not flag.exists() and threading.main_thread().is_alive() and not finished.is_set():
            if output.exists():
                try:
                    seen = outputs(output)
                except ValueError as error:
                    broken.append(str(error))
                    seen = ""
                if "line 2999" in seen:
                    flag.touch()

    finished = threading.Event()
    reader = threading.Thread(target=read_until_seen)
    reader.start()
    try:
        execute(source, output, {}, cwd=tmp_path)
    finally:
        finished.set()
        reader.join()
    assert broken == []
    assert len(json.loads(output.read_text())["cells"][0]["outputs"]) == 1  # 3,000 pieces of one stream are joined
    assert len(writes) >= 3  # the first, one while running, the last
    assert all(later - earlier >= live.SAVE_S for earlier, later in itertools.pairwise(writes[:-1]))


def test_runs_inside_a_running_event_loop(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = notebook(tmp_path / "in.ipynb", "print('inner')", kernelspec=None)

    async def outer() -> None:
        execute(source, tmp_path / "out.ipynb", {}, cwd=tmp_path)

    asyncio.run(outer())
    assert "inner" in capfd.readouterr().out
    assert json.loads((tmp_path / "out.ipynb").read_text())["metadata"]["kernelspec"]["name"] == "python3"


# --- parameters ----------------------------------------------------------------------------------------------------


def test_parameters_arrive_unchanged(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    alphabet = "ab \"'\\$`(){}[]%#\n\r\t\0\x1b\u2028é漢😀\ud800{x}"
    values: dict[str, Any] = {
        "p_quotes": "it's \"quoted\" '''and''' \"\"\"more\"\"\"",
        "p_shell": "$(touch never) `id` ${HOME} ; touch never & | > x",
        "p_lines": "a\nb\r\nc\td\n",
        "p_backslash": "\\ \\\\ \\n \\u0041 C:\\new\\",
        "p_unicode": "ñandú Ω 漢字 😀 \u2028 \x00 \x7f",
        "p_format": "{epochs} {0} %s %(x)s {{}}",
        "p_long": "x\"'\\" * 50_000,
        "p_nan": math.nan, "p_inf": math.inf, "p_minus_inf": -math.inf, "p_small": 1e-300, "p_float": 0.1,
        "p_minus_zero": -0.0, "p_int": 2**70, "p_true": True, "p_none": None, "p_one": 1, "p_one_float": 1.0,
        "p_nested": {"a key": [1, "two'\"", {"é": math.inf}], "": []},
        **{f"p_random{n}": "".join(rng.choices(alphabet, k=rng.randrange(60))) for n in range(20)},
    }  # fmt: skip
    # repr() keeps types, the sign of zero and lone surrogates apart.
    check = f"open({str(tmp_path / 'got')!r}, 'w', encoding='ascii').write(ascii([{', '.join(values)}]))"
    defaults = "\n".join(f"{name} = 'default'" for name in values)
    source = notebook(tmp_path / "in {x}.ipynb", ("parameters", defaults), check)
    given_file = tmp_path / "parameters.json"
    given_file.write_text(json.dumps(values))
    assert main([str(source), str(tmp_path / "out {x}.ipynb"), "--parameters", str(given_file)]) == 0
    assert (tmp_path / "got").read_text() == ascii(list(values.values()))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON: a browser can't open the notebook")

    json.loads((tmp_path / "out {x}.ipynb").read_text(), parse_constant=refuse)


def test_unknown_parameters_are_errors_with_the_nearest_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = notebook(tmp_path / "in.ipynb", ("parameters", "epochs = 1\nlr = 0.1"), "print('ran')")
    (tmp_path / "p.json").write_text('{"epoch": 2, "lr": 0.2, "zzz": 1}')
    assert main([str(source), str(tmp_path / "out.ipynb"), "--parameters", str(tmp_path / "p.json")]) == 2
    out, err = capfd.readouterr()
    assert "'epoch'" in err and "did you mean 'epochs'?" in err and "'zzz'" in err
    assert out == "" and not (tmp_path / "out.ipynb").exists()


@pytest.mark.parametrize("content", ["[1]", "{", "\xff"])
def test_a_parameters_file_that_is_none(tmp_path: Path, content: str, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.json").write_text(content, encoding="latin-1")
    arguments = [str(notebook(tmp_path / "in.ipynb", "1")), str(tmp_path / "out.ipynb")]
    assert main([*arguments, "--parameters", str(tmp_path / "p.json")]) == 2
    assert "p.json" in capfd.readouterr().err


# --- failures ------------------------------------------------------------------------------------------------------


def test_a_failed_cell_is_three_lines_and_a_marked_notebook(
    tmp_path: Path, temporary: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.ipynb"
    fail = "print('before')\nraise ValueError('bad\\nsecond line')"
    source = notebook(tmp_path / "in.ipynb", "a = 1", ("#", "## Train"), fail, "print('never')")
    assert main([str(source), str(output)]) == 1
    out, err = capfd.readouterr()
    assert err.splitlines() == [
        f"{source}: cell 2 of 3 (Train) failed",
        "  ValueError: bad",
        f"  fix: the traceback is in the log; executed so far: {output}",
    ]
    assert out.index("before") < out.index("Traceback (most recent call last)") < out.index("second line")
    assert "\x1b" not in out and "never" not in out
    text = output.read_text()
    assert "papermill-error-cell" in text and "Traceback" in text
    assert output.stat().st_mode & 0o777 == 0o600
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "reason", "status"),
    [
        # 137 keeps the question open for Slurm: killed, or out of memory?
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "killed by SIGKILL, most often for want of memory",
            137,
        ),
        ("import os; os._exit(3)", "its process ended with exit code 3", 1),
    ],
)
def test_a_kernel_that_dies_is_said_and_ends_the_run(
    tmp_path: Path, temporary: Path, capfd: pytest.CaptureFixture[str], code: str, reason: str, status: int
) -> None:
    source = notebook(tmp_path / "in.ipynb", "print('early')", ("#", "# Dies"), code, "print('never')")
    assert main([str(source), str(tmp_path / "out.ipynb")]) == status
    out, err = capfd.readouterr()
    assert err.splitlines()[:2] == [
        f"{source}: cell 2 of 3 (Dies) failed",
        f"  DeadKernelError: the kernel died: {reason}",
    ]
    assert len(err.splitlines()) == 3 and str(tmp_path / "out.ipynb") in err
    assert reason in out and "never" not in out
    text = (tmp_path / "out.ipynb").read_text()
    assert "papermill-error-cell" in text and reason in text and "early" in text
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            [sys.executable, "-c", "import sys; sys.exit('no module named torch')", "ipykernel"],
            "ended with exit code 1",
        ),
        ([sys.executable, "-c", "import time; time.sleep(60)"], "it doesn't answer"),
    ],
)
def test_a_kernel_that_never_starts_is_said(
    tmp_path: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    argv: list[str],
    said: str,
) -> None:
    install(tmp_path, monkeypatch, "broken", argv)
    monkeypatch.setattr(module, "START_TIMEOUT_S", 1)
    spec = {"name": "broken", "display_name": "Broken", "language": "python"}
    source = notebook(tmp_path / "in.ipynb", "print('never')", kernelspec=spec)
    assert main([str(source), str(tmp_path / "out.ipynb")]) == 1
    out, err = capfd.readouterr()
    assert len(err.splitlines()) == 3
    assert err.startswith(f"{source}: the kernel did not start") and said in err
    assert ("no module named torch" in out) == ("ipykernel" in argv)  # its own last words are in the log
    assert (tmp_path / "out.ipynb").exists() and list(temporary.iterdir()) == []


def test_no_ipykernel_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([str(notebook(tmp_path / "in.ipynb", "1")), str(tmp_path / "out.ipynb")]) == 2
    err = capfd.readouterr().err
    assert f"{sys.executable} has no ipykernel" in err and "pip install" in err and "Traceback" not in err


@pytest.mark.parametrize(("name", "content"), [("absent", None), ("empty", ""), ("text", "hello"), ("list", "[1, 2]")])
def test_input_that_is_no_notebook(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: str | None
) -> None:
    source = tmp_path / f"{name}.ipynb"
    if content is not None:
        source.write_text(content)
    assert main([str(source), str(tmp_path / "out.ipynb")]) == 2
    err = capfd.readouterr().err
    assert str(source) in err and "Traceback" not in err


def test_output_that_cannot_be_written_is_said_before_anything_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([str(notebook(tmp_path / "in.ipynb", "1")), str(tmp_path / "absent" / "out.ipynb")]) == 2
    out, err = capfd.readouterr()
    assert "absent/out.ipynb" in err and out == ""


def test_output_that_cannot_be_delivered_stays_on_the_node(tmp_path: Path, temporary: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    output = Output(folder / "out.ipynb")
    output.begin(new_notebook(cells=[new_code_cell("x = '\ud800'")]))
    assert nbformat.read(folder / "out.ipynb", as_version=4).cells[0].source == "x = '\ud800'"
    (folder / "out.ipynb").unlink()
    folder.rmdir()
    with pytest.raises(JobFailed) as caught:
        output.write()
    (kept,) = temporary.iterdir()
    assert str(kept) in str(caught.value) and kept.stat().st_mode & 0o777 == 0o600
    assert nbformat.read(kept, as_version=4).cells[0].source == "x = '\ud800'"


# --- signals -------------------------------------------------------------------------------------------------------


def test_sigterm_interrupts_saves_and_exits_143(tmp_path: Path) -> None:
    temporary, output = tmp_path / "t", tmp_path / "out.ipynb"
    temporary.mkdir()
    cell = "import os, time\nprint('kernel', os.getpid(), flush=True)\nfor n in range(600): time.sleep(0.1)"
    source = notebook(tmp_path / "in.ipynb", ("#", "# Long"), cell, "print('never')")
    words = [sys.executable, "-m", "hpcml.notebook.execute", str(source), str(output)]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(words, stdout=-1, stderr=-1, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "[cell 1/2] Long\n"
        kernel = int(process.stdout.readline().split()[1])  # through a pipe, while the cell runs: the log is live
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert err.splitlines() == [
        f"{source}: stopped in cell 1 of 2 (Long)",
        "  Interrupted: SIGTERM",
        f"  fix: run it again; what was done is in {output}",
    ]
    assert "KeyboardInterrupt" in out and "never" not in out
    assert "KeyboardInterrupt" in outputs(output) and f"kernel {kernel}" in outputs(output)
    assert list(temporary.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)


def test_sigint_ends_a_cell_that_ignores_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "GRACE_S", 0.3)
    flag, output = tmp_path / "flag", tmp_path / "out.ipynb"
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('deaf')\n"
    source = notebook(tmp_path / "in.ipynb", f"{deaf}open({str(flag)!r}, 'w').close()\ntime.sleep(60)")

    def interrupt() -> None:
        if wait_for(flag.exists):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert main([str(source), str(output)]) == 130
    finally:
        thread.join()
    assert capfd.readouterr().err.splitlines()[1] == "  Interrupted: SIGINT"
    assert "did not end" in outputs(output) and "deaf" in outputs(output)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as before the kernel
    assert signal.getsignal(signal.SIGTERM) is module._terminated


# --- which kernel --------------------------------------------------------------------------------------------------


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, argv: list[str], **more: Any) -> None:
    """Install a kernel where a user's own lie."""
    target = folder / "jupyter" / "kernels" / name
    target.mkdir(parents=True)
    (target / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": name, "language": "python", **more}))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(folder / "jupyter"))
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")


def test_python3_is_this_interpreter_whatever_the_home_directory_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, monkeypatch, "python3", ["/opt/other/bin/python", "-m", "ipykernel_launcher"])
    fakes = tmp_path / "bin"
    fakes.mkdir()
    (fakes / "python").symlink_to("/bin/false")
    monkeypatch.setenv("PATH", f"{fakes}:{os.environ['PATH']}")
    source = notebook(tmp_path / "in.ipynb", "import sys; print('it is', sys.executable)")
    execute(source, tmp_path / "out.ipynb", {}, cwd=tmp_path)
    assert f"it is {sys.executable}\n" in capfd.readouterr().out


def test_an_installed_kernel_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "mine", ["/opt/mine/kernel", "{connection_file}"], env={"WHOSE": "mine"})
    spec = Specs().get_kernel_spec("mine")
    assert (spec.argv[0], spec.env) == ("/opt/mine/kernel", {"WHOSE": "mine"})


def test_a_python_kernel_that_is_absent_or_elsewhere_is_this_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = {"kernel_provisioner": {"provisioner_name": "some-queue"}}
    install(tmp_path, monkeypatch, "on-a-node", ["python"], metadata=elsewhere)
    for name in ("on-a-node", "conda-env-tf-py"):
        assert Specs().get_kernel_spec(name).argv[0] == sys.executable
    with pytest.raises(HpcmlError, match="'ir' \\(R\\) is not installed"):
        Specs(language="R").get_kernel_spec("ir")


# --- papermill -----------------------------------------------------------------------------------------------------


def test_papermill_itself_can_use_the_engine(tmp_path: Path) -> None:
    metadata = tmp_path / "path" / "hpcml-0.dist-info"
    metadata.mkdir(parents=True)  # as installing writes it; the package itself may be on the path only
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hpcml\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[papermill.engine]\nhpcml = hpcml.notebook.engine:HpcmlEngine\n")
    source = notebook(tmp_path / "in.ipynb", ("parameters", "n = 1"), "print('n is', n)", kernelspec=PYTHON3)
    # The engine first: papermill, while it is imported, then finds the engine's own import under way.
    program = "import hpcml.notebook.engine; from papermill.__main__ import papermill; papermill()"
    words = [
        sys.executable,
        "-c",
        program,
        str(source),
        str(tmp_path / "out.ipynb"),
        "--engine",
        "hpcml",
        "-p",
        "n",
        "7",
    ]
    path = os.pathsep.join([str(metadata.parent), *(p for p in sys.path if p)])
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "[cell 3/3]" in done.stdout and "n is 7" in done.stdout
    assert "n is 7" in outputs(tmp_path / "out.ipynb")


# --- the log -------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_everything_as_it_is() -> None:
    out = Terminal()
    Log(out).stream("stdout", "\x1b[1m10%\r20%\r")
    assert out.getvalue() == "\x1b[1m10%\r20%\r"


def test_text_without_a_newline_appears_at_once_and_ends_before_other_text() -> None:
    out = io.StringIO()
    log = Log(out)
    log.stream("stdout", "load")
    assert out.getvalue() == "load"
    log.stream("stdout", "ing")
    assert out.getvalue() == "loading"
    log.stream("stderr", "careful\n")
    log.say("[cell 2/2] next")
    assert out.getvalue() == "loading\ncareful\n[cell 2/2] next\n"


def test_a_progress_bar_becomes_its_last_state() -> None:
    out = io.StringIO()
    log = Log(out)
    for step in range(10_000):
        log.stream("stderr", f"\r\x1b[32m{step / 100:.0f}%|{'█' * (step // 1000)}")
    log.stream("stderr", "\rdone\n")
    log.stream("stdout", "1/2 [=>..]\b\b\b\b\b\b\b\b\b\b\r")
    log.stream("stdout", "2/2 [====]")
    log.say("end")
    assert out.getvalue() == "done\n2/2 [====]\nend\n"


def test_a_long_progress_bar_shows_that_it_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    out = io.StringIO()
    log = Log(out)
    for step in range(1001):
        now = step / 10
        log.stream("stderr", f"{step}\r")
    assert out.getvalue().splitlines() == [str(step) for step in range(100, 1001, 100)]


def test_a_log_that_is_closed_does_not_end_the_run() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    log = Log(Gone())
    log.say("one")
    log.say("two")


@given(st.text(st.characters(exclude_characters="\r\b\x1b", exclude_categories=["Cs"])), st.lists(st.integers(0, 60)))
def test_plain_text_is_logged_unchanged_however_it_is_cut(text: str, cuts: list[int]) -> None:
    out = io.StringIO(newline="\n")
    log = Log(out)
    for piece in pieces(text, cuts):
        log.stream("stdout", piece)
    assert out.getvalue() == text


@given(st.text("ab\r\n"), st.lists(st.integers(0, 60)))
def test_a_stream_is_joined_the_same_however_it_is_cut(text: str, cuts: list[int]) -> None:
    whole = ""
    for piece in pieces(text, cuts):
        whole = joined(whole, piece)
    assert whole == joined("", text)
    assert [settled(line) for line in whole.split("\n")] == [settled(line) for line in text.split("\n")]


def pieces(text: str, cuts: list[int]) -> list[str]:
    """Cut text at positions."""
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(places)]
