"""A tiny data set and ways to run the scripts, shared by the tests."""

import os

# Tensors are small here: a second thread that waits for a busy core only costs time. Set before
# PyTorch is imported; scripts in subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
import io
import json
import subprocess
import sys
import tempfile
import uuid
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode
from watchdog import kill_marked

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _no_orphans():
    """Scripts inherit a mark, by which a watchdog finds and ends them if the tests are killed."""
    name, mark = "PFGMPP_TEST_SESSION", uuid.uuid4().hex
    others = {key: value for key, value in os.environ.items() if key != name}
    watchdog = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "watchdog.py", str(os.getpid()), f"{name}={mark}"],
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
    with tempfile.TemporaryDirectory(prefix="pfgmpp-", ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = folder
        yield


def write_dataset(path: Path, num: int = 40, side: int = 8, classes: int = 2, channels: int = 3,
                  vectors: bool = False):
    """Writes a ZIP of noisy images whose brightness tells the class; None labels if classes=0."""
    rng = np.random.default_rng(0)
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(num):
            k = i % max(classes, 1)
            pixels = rng.integers(0, 120, [side, side, channels]) + 120 * k
            buffer = io.BytesIO()
            PIL.Image.fromarray(pixels.astype(np.uint8).squeeze()).save(buffer, "PNG")
            name = f"00000/img{i:08d}.png"
            archive.writestr(name, buffer.getvalue())
            labels.append([name, [0.0, float(k), -1.5] if vectors else k])
        archive.writestr("dataset.json", json.dumps({"labels": labels if classes else None}))
    return path


@pytest.fixture(scope="session")
def dataset_zip(tmp_path_factory) -> Path:
    """40 RGB images 8x8 in 2 classes."""
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny.zip")


# The smallest network with every part: two levels, attention, augmentation, dropout.
TINY_NETWORK = ["--cbase=8", "--cres=1,2", "--nblock=1", "--arch=ncsnpp"]
TINY_RUN = [*TINY_NETWORK, "--batch=8", "--lr=1e-2", "--lr-rampup=0.00001", "--ema=0.00001",
            "--workers=0", "--seed=3", "--samples=0"]


@pytest.fixture
def invoke():
    """Returns a function that runs a script's command in this process."""
    def call(main, *args):
        return CliRunner().invoke(main, [str(arg) for arg in args])
    return call


def run_script(*args, processes: int = 0, check: bool = True) -> subprocess.CompletedProcess:
    """Runs a script in a subprocess, under torchrun if `processes` > 0."""
    launch = [sys.executable]
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone",
                   f"--nproc_per_node={processes}"]
    done = subprocess.run([*launch, *map(str, args)], cwd=ROOT, text=True, capture_output=True,
                          timeout=300)
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def load_script(path):
    """Returns a script of the project as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class HostReads(TorchDispatchMode):
    """Collects the operations that wait for a device to tell the host a value or a size."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique",
             "repeat_interleave", "histc", "bincount")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1])
        if by_mask or name.startswith(self.NAMES):
            self.found.append(name)
        return func(*args, **(kwargs or {}))
