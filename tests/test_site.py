"""Sites: loading, choosing, limits, and folders with variables in them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcml import job
from hpcml import site as sites
from hpcml.errors import HpcmlError


@pytest.fixture(autouse=True)
def own_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's own sites folder, empty; no sbatch on PATH."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    folder = tmp_path / "config" / "hpcml" / "sites"
    folder.mkdir(parents=True)
    return folder


def test_the_built_in_sites_are_sound() -> None:
    assert set(sites.known()) == {"local", "generic", "ft3"}
    for name, path in sites.known().items():
        site = sites.load(name)
        assert site.description and site.path == path
        assert site.scheduler == ("local" if name == "local" else "slurm")


def test_a_persons_own_site_hides_a_built_in_one(own_sites: Path) -> None:
    (own_sites / "ft3.toml").write_text('description = "mine"\n')
    assert sites.load("ft3").description == "mine"


def test_a_site_by_path(tmp_path: Path) -> None:
    path = tmp_path / "lab.toml"
    path.write_text('gpu_request = "gpu:h100:{count}"\nmodules = ["cuda"]\n')
    site = sites.load(str(path))
    assert (site.name, site.gpu_request, site.modules) == (str(path), "gpu:h100:{count}", ("cuda",))


@pytest.mark.parametrize("name", ["ft4", "nowhere.toml"])
def test_an_unknown_site_names_the_known(name: str) -> None:
    with pytest.raises(HpcmlError) as error:
        sites.load(name)
    assert "ft3" in str(error.value) and "--site" in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = ", "not valid TOML"),
        ("core_per_gpu = 2\n", "did you mean 'cores_per_gpu'"),
        ("cores_per_gpu = '2'\n", "cores_per_gpu = '2' has the wrong type"),
        ("cores_per_gpu = true\n", "wrong type"),
        ("modules = 'cuda'\n", "wrong type"),
        ("modules = [1]\n", "modules = [1] has the wrong type"),
        ("cluster_names = ['a', 2]\n", "wrong type"),
        ("scheduler = 'pbs'\n", "scheduler = 'pbs'"),
        ("delivery = 'never'\n", "auto, job, login"),
        ("limits = 3\n", "limits = 3 is not a table"),
        ("[limits]\ngpus = 3\n", "unknown key 'limits.gpus'"),
        ("[limits]\nnodes = -1\n", "limits.nodes = -1 is not a whole number"),
        ("[limits]\nmax_time = 'long'\n", "limits.max_time = 'long' is not a time limit"),
        ("partitions = 3\n", "partitions = 3 is not a table"),
        ("[partitions]\nshort = 3\n", "partitions.short = 3 is not a table"),
    ],
)
def test_what_is_wrong_with_a_site_is_said_with_its_file(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(HpcmlError) as error:
        sites.load(str(path))
    assert says in str(error.value) and str(path) in str(error.value)


def test_all_problems_of_a_site_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("colour = 'red'\ncores_per_gpu = 'two'\n[limits]\nnodes = 'many'\n")
    with pytest.raises(HpcmlError) as error:
        sites.load(str(path))
    assert len(error.value.problems) == 3


def test_a_partition_narrows_the_sites_limits() -> None:
    ft3 = sites.load("ft3")
    assert job.seconds(ft3.limits_of(None).max_time or "") == 7 * 86400
    short = ft3.limits_of("short")
    assert (short.max_time, short.gpus_per_node) == ("06:00:00", 2)
    assert ft3.limits_of("unheard-of") == ft3.limits


def test_the_site_is_chosen_by_the_first_that_says_so(
    tmp_path: Path, own_sites: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_sites / "mine.toml").write_text('cluster_names = ["zeus"]\n')

    def chosen(name: str | None = None, cluster: str | None = None) -> tuple[str, str]:
        site, why = sites.choose(name, cluster)
        return site.name, why

    assert chosen() == ("local", "no sbatch on PATH")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\n")
    os.chmod(tmp_path / "bin" / "sbatch", 0o755)
    assert chosen() == ("generic", "sbatch is on PATH")
    assert chosen(cluster="unheard-of")[0] == "generic"
    assert chosen(cluster="zeus") == ("mine", "ClusterName is zeus")
    assert chosen(cluster="finisterrae3")[0] == "ft3"
    monkeypatch.setenv("HPCML_SITE", "local")
    assert chosen(cluster="zeus") == ("local", "$HPCML_SITE")
    assert chosen("ft3", "zeus") == ("ft3", "--site")
    monkeypatch.setenv("HPCML_SITE", "nowhere")
    with pytest.raises(HpcmlError, match=r"\$HPCML_SITE: unknown site 'nowhere'"):
        sites.choose()


def test_variables_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUSTRE", "/mnt/lustre/me")
    monkeypatch.setenv("HPCML_PROJECT", "/elsewhere")
    assert sites.expand("$LUSTRE/a/${LUSTRE}b", "o", tmp_path) == "/mnt/lustre/me/a//mnt/lustre/meb"
    assert sites.expand("$HPCML_PROJECT/runs", "o", tmp_path) == f"{tmp_path}/runs"


def test_an_unset_variable_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUSTRE", raising=False)
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(HpcmlError) as error:
        sites.expand("$LUSTRE/$EMPTY/runs", "site ft3: runs", tmp_path)
    assert "site ft3: runs" in str(error.value) and "$LUSTRE, $EMPTY" in str(error.value)


@pytest.mark.parametrize(
    ("delivery", "address", "by_job"),
    [
        ("auto", "sqlite:////home/a/mlflow.db", False),
        ("auto", "https://mlflow.example.org", True),
        ("auto", "http://127.0.0.1:5000", True),
        ("auto", "postgresql://host/db", False),
        ("job", "postgresql://host/db", True),
        ("job", "sqlite:////home/a/mlflow.db", False),
        ("login", "https://mlflow.example.org", False),
    ],
)
def test_who_delivers_a_run_while_it_goes_on(delivery: str, address: str, by_job: bool) -> None:
    assert sites.Site("x", delivery=delivery).delivers_in_job(address) == by_job


def test_compute_nodes_without_a_network_deliver_nothing() -> None:
    assert sites.load("ft3").delivery == "login"
    assert sites.load("local").delivery == sites.load("generic").delivery == "auto"
