"""Imports point down, cost nothing, and the names that users of EDM rely on are where they were."""

import ast
import functools
import importlib
import inspect
import json
import os
import subprocess
import sys

import pytest
from scripts import HANG_SEC, ROOT, SCRIPTS

import pfgmpp

# A room may import those before it.
ROOMS = ("dnnlib", "torch_utils", "images", "pfgmpp", "checkpoints", "sampling", "metrics",
         "training", "reports")
# Where people who come from EDM, or from our first plan, look, and what they find there.
ALIASES = {"training.dataset": "images.dataset", "training.networks": "pfgmpp.networks",
           "training.loss": "pfgmpp.loss", "training.augment": "pfgmpp.augment",
           "training.sampling": "pfgmpp.samplers", "training.perturbation": "pfgmpp.kernel"}


def module_files():
    """Returns {dotted name: file} of the project, without tests."""
    files = {name: ROOT / f"{name}.py" for name in SCRIPTS}
    for package in ROOMS:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for path in (ROOT / "docs").glob("*.py"):
        files[f"docs.{path.stem}"] = path
    return files


FILES = module_files()


def imports_of(name, path):
    """Returns every dotted name that a file imports, anywhere in it."""
    found = set()
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")
                base = ".".join(filter(None, [*up[:len(up) - node.level + 1], base]))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in FILES else base)
    return found


@functools.cache
def all_imports():
    return {name: imports_of(name, path) for name, path in FILES.items()}


def layer(name):
    room = name.split(".")[0]
    return ROOMS.index(room) if room in ROOMS else len(ROOMS)


def upward_edges(imports):
    return [f"{importer} imports {name}" for importer, names in imports.items() for name in names
            if name in FILES and importer.split(".")[0] != name.split(".")[0]
            and layer(name) >= layer(importer) and layer(importer) < len(ROOMS)]


def cycle_in(imports):
    """Returns the modules of an import cycle, or None."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name):] + [name]
        if name in done or name not in imports:
            return None
        path.append(name)
        for target in sorted(imports[name]):
            if cycle := visit(target):
                return cycle
        done.add(path.pop())
        return None
    return next(filter(None, map(visit, sorted(imports))), None)


def test_imports_point_down():
    assert upward_edges(all_imports()) == []


def test_aliases_are_their_homes_and_nothing_here_needs_them():
    for alias, home in ALIASES.items():
        assert all_imports()[alias] == {home}
        names = {name: value for name, value in vars(importlib.import_module(home)).items()
                 if not name.startswith("_")}
        assert names.items() <= vars(importlib.import_module(alias)).items()
        assert not [name for name, imported in all_imports().items() if alias in imported]


LAZY = """
import sys
import pfgmpp
rooms = {"dnnlib", "torch_utils", "images", "checkpoints", "sampling", "metrics"}
early = sorted({"torch", "numpy", *rooms} & set(sys.modules))
assert not early, early
assert {"load", "Model", "PerturbationKernel"} <= set(dir(pfgmpp))
from pfgmpp import PerturbationKernel
assert PerturbationKernel is __import__("pfgmpp.kernel").kernel.PerturbationKernel
early = sorted(rooms & set(sys.modules))
assert not early, early
from pfgmpp import load, Model
import metrics.model
assert load is metrics.model.load and Model is metrics.model.Model
assert not hasattr(pfgmpp, "sample")
print("lazy")
"""


@pytest.mark.long
def test_the_name_of_the_project_gives_a_network_and_imports_nothing_before(tmp_path):
    """The one place where a room names later ones: by text, in `__getattr__`."""
    assert all_imports()["pfgmpp"] <= {"importlib", "importlib.util", "pathlib", "typing"}
    assert set(pfgmpp._ROOMS) == set(ROOMS[:ROOMS.index("metrics") + 1]) - {"pfgmpp"}
    (tmp_path / "images").mkdir()  # a folder of pictures, as people have them
    (tmp_path / "metrics").mkdir()
    done = subprocess.run([sys.executable, "-c", LAZY], cwd=tmp_path, text=True, timeout=HANG_SEC,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (0, "lazy\n"), done.stderr


def test_a_module_of_the_user_that_hides_a_room_is_named(tmp_path):
    (tmp_path / "metrics.py").write_text("")
    code = "import pfgmpp\ntry:\n    pfgmpp.load\nexcept ImportError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, timeout=HANG_SEC,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout == (
        f"pfgmpp needs the package 'metrics' of {ROOT}, but Python finds {tmp_path}/metrics.py "
        f"under this name; rename that, or put {ROOT} before it in PYTHONPATH\n"), done.stderr


def test_imports_have_no_cycle():
    assert cycle_in(all_imports()) is None


def test_the_walk_finds_upward_edges_and_cycles():
    assert upward_edges({"dnnlib.util": {"torch_utils.misc"}})
    assert upward_edges({"metrics.statistics": {"training.trainer"}})
    assert upward_edges({"pfgmpp.loss": {"train"}})
    assert upward_edges({"pfgmpp.loss": {"training.ema"}})
    assert not upward_edges({"pfgmpp.loss": {"pfgmpp.kernel", "torch_utils.misc", "torch"}})
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert {"pfgmpp.networks", "dnnlib.util", "metrics.statistics", "train"} <= FILES.keys()
    assert "pfgmpp.networks" in all_imports()["checkpoints.checkpoint"]


def roots(prefix):
    return {target.split(".")[0] for name, targets in all_imports().items()
            if name.split(".")[0] == prefix for target in targets}


def test_dnnlib_needs_no_torch():
    assert not roots("dnnlib") & {"torch", "torchvision", "scipy"}


def test_the_kernel_needs_torch_alone():
    assert all_imports()["pfgmpp.kernel"] <= {"math", "torch"}


def test_solvers_never_see_a_network_or_D():
    for name in ("pfgmpp.solvers", "pfgmpp.schedules", "pfgmpp.kernel"):
        assert not all_imports()[name] & {"pfgmpp.networks", "pfgmpp.unets"}
    assert "pfgmpp.kernel" not in all_imports()["pfgmpp.solvers"]  # nor D


def test_scipy_is_for_quantiles_alone():
    found = {module for module, names in all_imports().items()
             if any("scipy" in name.split(".") for name in names)}
    assert found == {"reports.training_seeds", "sampling.latents"}


IMPORT_ALL = """
import importlib, json, sys
import numpy, random, torch
before = torch.get_rng_state(), str(numpy.random.get_state()), random.getstate()
threads = torch.get_num_threads(), torch.get_default_dtype(), torch.backends.cudnn.benchmark
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
assert torch.equal(before[0], torch.get_rng_state()), "the torch generator was used"
assert before[1] == str(numpy.random.get_state()) and before[2] == random.getstate()
assert threads == (torch.get_num_threads(), torch.get_default_dtype(),
                   torch.backends.cudnn.benchmark), "a global setting was changed"
assert not torch.cuda.is_initialized(), "the GPU was started"
"""


def python(code, *args):
    return subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, text=True,
                          capture_output=True, timeout=HANG_SEC)


@pytest.mark.long
def test_importing_every_module_does_nothing():
    names = [name for name in FILES if not name.startswith("docs.")]
    done = python(IMPORT_ALL, json.dumps(names))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


HELP = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
heavy = sorted({"torch", "scipy", "torchvision"} & set(sys.modules))
assert not heavy, heavy
"""


@pytest.mark.scripts
@pytest.mark.parametrize("command", [*SCRIPTS, "fid calc", "fid ref"])
def test_help_needs_no_torch(command):
    script, *subcommand = command.split()
    done = python(HELP, f"{script}.py", *subcommand, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout and "--help" in done.stdout


@pytest.mark.parametrize("module, names", [
    ("training.networks", "SongUNet DhariwalUNet VPPrecond VEPrecond iDDPMPrecond EDMPrecond"),
    ("training.loss", "EDMLoss VELoss VPLoss"),
    ("training.augment", "AugmentPipe"),
    ("training.dataset", "ImageFolderDataset"),
    ("training.sampling", "edm_sampler StackedRandomGenerator"),
    ("training.perturbation", "PerturbationKernel"),
    ("dnnlib", "EasyDict util"),
    ("dnnlib.util", "EasyDict open_url Logger"),
    ("torch_utils.distributed", "init get_rank get_world_size print0"),
    ("torch_utils.training_stats", "report Collector")])
def test_names_that_forks_import_are_there(module, names):
    module = importlib.import_module(module)
    assert all(callable(getattr(module, name, None)) or name == "util" for name in names.split())


@pytest.mark.parametrize("path, names", [
    ("training.networks.SongUNet",
     "img_resolution in_channels out_channels label_dim augment_dim model_channels channel_mult "
     "channel_mult_emb num_blocks attn_resolutions dropout label_dropout embedding_type "
     "channel_mult_noise encoder_type decoder_type resample_filter"),
    ("training.networks.DhariwalUNet",
     "img_resolution in_channels out_channels label_dim augment_dim model_channels channel_mult "
     "channel_mult_emb num_blocks attn_resolutions dropout label_dropout"),
    ("training.networks.EDMPrecond.forward",
     "self x sigma class_labels force_fp32 augment_labels"),
    ("training.sampling.edm_sampler",
     "net latents class_labels randn_like num_steps sigma_min sigma_max rho S_churn S_min S_max "
     "S_noise"),
    ("training.dataset.ImageFolderDataset",
     "path resolution use_pyspng max_size use_labels xflip random_seed cache")])
def test_arguments_have_the_references_names_and_order(path, names):
    parts = path.split(".")
    value = importlib.import_module(".".join(parts[:2]))
    for part in parts[2:]:
        value = getattr(value, part)
    assert list(inspect.signature(value).parameters)[:len(names.split())] == names.split()


@pytest.mark.parametrize("name", ["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_preconditioners_take_the_references_arguments(name):
    cls = getattr(importlib.import_module("training.networks"), name)
    own = {"EDMPrecond": {"pfgmpp": True, "D": 64, "sigma_min": 0, "sigma_max": 90,
                          "sigma_data": 0.4},
           "VEPrecond": {"pfgmpp": True, "D": 64, "sigma_min": 0.1, "sigma_max": 90},
           "VPPrecond": {"beta_d": 19, "beta_min": 0.2, "M": 900, "epsilon_t": 1e-4},
           "iDDPMPrecond": {"C_1": 0.002, "C_2": 0.009, "M": 900}}[name]
    net = cls(8, 3, 2, False, model_type="SongUNet", model_channels=8, channel_mult=[1],
              num_blocks=1, attn_resolutions=[], **own)
    assert (net.img_resolution, net.img_channels, net.label_dim, net.use_fp16) == (8, 3, 2, False)
    assert net.pfgmpp is ("pfgmpp" in own) and own.get("D", float("inf")) == net.D
    for key, value in own.items():
        assert getattr(net, key) == pytest.approx(value, rel=1e-6), key
    assert callable(net.round_sigma) and net.model is not None and net.N == 192
