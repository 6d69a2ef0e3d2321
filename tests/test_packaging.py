"""`pip install -e .` makes a checkout importable from anywhere; a wheel of it is refused."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from scripts import ROOT, SCRIPTS
from tiny import TINY_RUN, write_dataset

tomllib = pytest.importorskip("tomllib")  # since Python 3.11
PACKAGES = ["dnnlib", "torch_utils", "images", "pfgmpp", "checkpoints", "sampling", "metrics",
            "training", "reports"]


def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def git(*words):
    """Returns what git says of the checkout, which may belong to another user."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout of git")
    return subprocess.run(["git", "-c", "safe.directory=*", *words], cwd=ROOT, text=True,
                          capture_output=True, check=True).stdout


def test_every_script_and_package_is_installed():
    project = pyproject()
    assert project["tool"]["setuptools"]["package-dir"] == {"": "."}  # a line in a .pth
    assert project["tool"]["setuptools"]["packages"] == PACKAGES
    assert sorted(project["tool"]["setuptools"]["py-modules"]) == SCRIPTS
    files = git("ls-files", "--cached", "--others", "--exclude-standard").split()
    data = project["tool"]["setuptools"]["package-data"]
    for package in PACKAGES:  # no folder inside that the list would leave out, no data left out
        inside = [Path(name) for name in files if name.startswith(f"{package}/")]
        assert {(len(path.parts), f"*{path.suffix}") for path in inside} == {
            (2, pattern) for pattern in ("*.py", *data.get(package, ()))}
    assert project["project"]["scripts"] == {
        f"pfgmpp-{name.replace('_', '-')}": f"{name}:cli" for name in SCRIPTS}


@pytest.mark.parametrize("room", ["images", "checkpoints", "reports"])
def test_own_files_in_a_folder_named_like_a_room_are_ignored(room):
    data = pyproject()["tool"]["setuptools"]["package-data"].get(room, [])
    ours = [f"{room}/code{pattern[1:]}" for pattern in ("*.py", *data)]
    names = [f"{room}/a/x.png", f"{room}/b.pt", *ours]
    assert git("check-ignore", "--no-index", *names).split() == names[:2]
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    first = rules.index(f"{room}/*") + 1
    assert rules[first:first + len(ours)] == [f"!{room}/{pattern}" for pattern in ("*.py", *data)]


def test_versions_and_extras_have_one_home():
    project = pyproject()["project"]
    development = (ROOT / "requirements-dev.txt").read_text()
    for packages in project["optional-dependencies"].values():
        for package in packages:
            assert package in development or package.startswith("wandb")  # a stub stands for it
    changes = (ROOT / "CHANGELOG.md").read_text()
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"## {project['version']} " in changes and f"version: {project['version']}" in citation


def run(*words, cwd, **env):
    done = subprocess.run([str(word) for word in words], cwd=cwd, text=True, capture_output=True,
                          timeout=300, env=os.environ | env)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, for building writes into the folder."""
    source = tmp_path_factory.mktemp("checkout") / "source"
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard",
                    cwd=ROOT).splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source / name)
    return source


PIP = ("--no-deps", "--no-build-isolation", "--no-index")  # with the setuptools that is there


@pytest.mark.slow
def test_a_wheel_is_refused_in_one_line(source, tmp_path):
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", *PIP, "--wheel-dir", tmp_path,
                           source], cwd=tmp_path, text=True, capture_output=True, timeout=300)
    line = ("pfgmpp is used from its checkout: install it by 'pip install -e .', or run the "
            "scripts there without installing anything")
    assert done.returncode == 1 and line in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_editable_install_trains_samples_and_scores_anywhere(source, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    binaries = tmp_path / "venv/bin"
    [packages] = (tmp_path / "venv/lib").glob("python*/site-packages")
    # PyTorch and setuptools of the environment that runs this test.
    (packages / "present.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    run(sys.executable, "-m", "pip", "--python", binaries / "python", "install", *PIP, "-e", source,
        cwd=tmp_path)
    installed = {path.name.partition("-")[0] for path in packages.iterdir()}
    assert installed == {"present.pth", "__editable__.pfgmpp", "pfgmpp"}  # the last are metadata

    work = tmp_path / "work"  # no file of the checkout is here
    (work / "images").mkdir(parents=True)  # but a folder with the name of a room
    found = run(binaries / "python", "-c", "import json, train, pfgmpp.networks as n, dnnlib, "
                "metrics, torch_utils; print(json.dumps([m.__file__ for m in "
                "(train, n, dnnlib, metrics, torch_utils)]))", cwd=work)
    assert all(Path(path).is_relative_to(source) for path in json.loads(found))
    shown = run(binaries / "python", "-c", "from pfgmpp import load; print(load("
                f"{str(source / 'examples/emoji16-128.pt')!r}, device='cpu').sample(2, steps=2))",
                cwd=work)
    assert shown == "Samples(2 images 3x16x16)\n"
    for name in pyproject()["project"]["scripts"]:
        assert "Usage: " in run(binaries / name, "--help", cwd=work)
    data = write_dataset(work / "tiny.zip")
    run(binaries / "pfgmpp-train", "--outdir=runs", "--name=a", f"--data={data}", *TINY_RUN,
        "--duration=0.000008", cwd=work)
    assert json.loads((work / "runs/a/training_options.json").read_text())["provenance"][
        "commit"] is None
    run(binaries / "pfgmpp-generate", "--network=runs/a/network-snapshot-000000.pt",
        "--outdir=out", "--seeds=0-3", "--steps=2", cwd=work)
    score = run(binaries / "pfgmpp-fid", "calc", "--images=out", f"--ref={data}", "--num=4",
                "--detector=pixels", cwd=work)
    assert score.startswith("pixels Frechet distance: ")
    assert " finished " in run(binaries / "pfgmpp-runs", cwd=work)
    assert "report.html: 1 run" in run(binaries / "pfgmpp-report", "runs/a", cwd=work)
    run(binaries / "python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "-m", "train", "--outdir=runs", "--name=b", f"--data={data}", *TINY_RUN,
        "--duration=0.000008", cwd=work)
