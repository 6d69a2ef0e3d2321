"""Fixtures that every test may use; plain functions are in helpers/."""

import os

# Tensors are small here: a second thread that waits for a busy core only costs time. Set before
# PyTorch is imported; scripts in subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Servers that tests ask are their own, whatever proxy leads to others.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest
from click.testing import CliRunner
from scripts import ROOT
from tiny import write_dataset
from watchdog import kill_marked


@pytest.fixture(scope="session", autouse=True)
def _no_orphans():
    """Scripts inherit a mark, by which a watchdog finds and ends them if the tests are killed."""
    name, mark = "PFGMPP_TEST_SESSION", uuid.uuid4().hex
    others = {key: value for key, value in os.environ.items() if key != name}
    watchdog = subprocess.Popen(
        [sys.executable, ROOT / "tests/helpers/watchdog.py", str(os.getpid()), f"{name}={mark}"],
        env=others, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    os.environ[name] = mark
    yield
    watchdog.kill()
    watchdog.wait()
    kill_marked(f"{name}={mark}")


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory):
    """Scripts keep caches, and what a killed torchrun leaves, in folders of the tests.

    The latter's path is short, as those of sockets in it must be.
    """
    os.environ["PFGMPP_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    with tempfile.TemporaryDirectory(prefix="pfgmpp-", ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = folder
        yield


@pytest.fixture(autouse=True)
def _no_lines_for_want_of_speed(request, monkeypatch):
    """A slow machine writes no lines of progress between the results that tests compare."""
    if request.path.name != "test_progress.py":
        monkeypatch.setattr("dnnlib.progress.LINE_SEC", 900.0)


@pytest.fixture(scope="session")
def dataset_zip(tmp_path_factory) -> Path:
    """40 RGB images 8x8 in 2 classes."""
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny.zip")


@pytest.fixture
def invoke():
    """Returns a function that runs a script's command in this process."""
    def call(main, *args):
        return CliRunner().invoke(main, [str(arg) for arg in args])
    return call


