"""What the documents say: commands run, names exist, numbers are right, versions agree."""

import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
import torch
from click.testing import CliRunner
from dicom_slices import dicom, stored
from pickle_assembler import zip_file
from plugin_files import parts_of_extending, registries_kept
from published_archives import write_cifar10, write_lmdb, write_mnist
from published_files import ForkDenoiser, fork_state
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless
from scipy import stats
from scripts import ROOT, load_script
from sklearn.datasets import load_digits
from snapshots import write_snapshot
from tiny import write_dataset
from torch.distributed.run import get_args_parser

from benchmarks.__main__ import main as benchmarks
from checkpoints import checkpoint
from dnnlib.util import json_value
from images.dicom_files import decode as decode_dicom
from sampling.sampling_options import sampling_options

results, toy = load_script("docs/results.py"), load_script("docs/toy.py")
phantoms, phases = load_script("docs/phantoms.py"), load_script("docs/phases.py")
study, off_level = load_script("docs/study.py"), load_script("docs/off_level.py")
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples/README.md"]
SCRIPTS = {f"{name}.py": importlib.import_module(name).main
           for name in ("train", "distill", "generate", "generate_alpha", "generate_steps",
                        "generate_quant", "fid", "likelihood", "dataset_tool", "checkpoint_tool",
                        "sweep", "report", "runs")}
SCRIPTS |= {"docs/toy.py": toy.main, "docs/results.py": results.main,
            "docs/phantoms.py": phantoms.main, "docs/phases.py": phases.main,
            "docs/study.py": study.main, "docs/off_level.py": off_level.main,
            "benchmarks": benchmarks}
PRESETS = {f"generate_{name}.py" for name in ("alpha", "steps", "quant")}  # of generate.py
SAMPLING_FLAGS = {flag for option in sampling_options(lambda: None).__click_params__
                  for flag in option.opts}
PUBLISHED = "downloads/pfgmpp/"  # checkpoints of PFGM++; a snapshot of ours stands for them


# ----------------------------------------------------------------------------------- commands


def blocks(path):
    """Returns the fenced code blocks of a document, continued lines joined."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)


def documented_commands():
    """Returns (file, words) of every `python ...` and `torchrun ...` line of the documents."""
    found = []
    for path in DOCS:
        for line in "".join(blocks(path)).splitlines():
            if match := re.match(r"(?:docker run .*?\s)?((?:python|torchrun) .*)", line):
                found.append((path.name, shlex.split(match[1], comments=True)))
    return found


def script_and_args(words):
    """Returns the script's name and its arguments, by torchrun's own parser where it starts it."""
    if words[0] == "python":
        return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    launch = get_args_parser().parse_args(words[1:])
    return Path(launch.training_script).name, launch.training_script_args


COMMANDS = documented_commands()


@pytest.mark.parametrize("words", [words for _, words in COMMANDS],
                         ids=[f"{where}-{i}" for i, (where, _) in enumerate(COMMANDS)])
def test_documented_command_parses(words, tmp_path):
    script, args = script_and_args(words)
    (tmp_path / "training_options.json").write_text('{"data": "data.zip"}')
    args = [re.sub("(?<=--config=).*/", f"{tmp_path}/", arg) for arg in args]
    if any(arg.startswith("--plugin=") for arg in args):
        (tmp_path / "my_parts.py").write_text(parts_of_extending())
        args = [arg.replace("--plugin=", f"--plugin={tmp_path}/") for arg in args]
    command = SCRIPTS[script]
    if args and args[0] in getattr(command, "commands", ()):
        command, args = command.commands[args[0]], args[1:]
    with registries_kept():
        command.make_context(script, list(args))


def test_every_script_is_documented_with_both_launchers():
    started = {(words[0], script_and_args(words)[0]) for _, words in COMMANDS}
    assert {script for _, script in started} == set(SCRIPTS)
    assert {script for launcher, script in started if launcher == "torchrun"} == {
        "train.py", "distill.py", "generate.py", "fid.py", "likelihood.py", *PRESETS}
    assert len(COMMANDS) > 25


@pytest.mark.scripts
@pytest.mark.parametrize("D, nodes", [("128", 1), ("inf", 2)])
@pytest.mark.parametrize("what, images", [
    ("cifar10", 200), ("cifar10-cond", 200), ("ffhq", 200), ("afhqv2", 200), ("imagenet", 2500)])
def test_the_script_of_published_settings_prints_commands_that_parse(what, images, D, nodes):
    env = os.environ | {"ECHO": "1", "D": D, "NODES": str(nodes), "HOST": "n0:1", "GPUS": "8"}
    done = subprocess.run(["bash", str(ROOT / "examples/published.sh"), what], text=True, env=env,
                          capture_output=True, check=True)
    found = [script_and_args(shlex.split(line[2:])) for line in done.stdout.splitlines()]
    assert [script for script, _ in found] == ["dataset_tool.py", "train.py", "fid.py",
                                               "generate.py"]
    for script, args in found:
        command = SCRIPTS[script]
        if args[0] in getattr(command, "commands", ()):
            command, args = command.commands[args[0]], args[1:]
        params = command.make_context(script, list(args)).params
        if script == "train.py":
            assert (params["duration"], params["pfgmpp"]) == (images, D != "inf")
            assert params["aug_dim"] == 128  # the default where it is not used


@pytest.mark.slow
def test_the_script_of_published_settings_runs_and_runs_again(tmp_path):
    """From an archive to scores and pictures in one process each; again, nothing is left to do."""
    images = (np.arange(20 * 3072) % 251).astype(np.uint8).reshape(20, 32, 32, 3)
    write_cifar10(tmp_path / "cifar.tar.gz", images, np.arange(20) % 10)
    tiny = "--cbase=8 --cres=1 --nblock=1 --ares=none --batch=8 --duration=0.000016 --workers=0"
    env = os.environ | {
        "GPUS": "1", "SOURCE": str(tmp_path / "cifar.tar.gz"), "DATA": str(tmp_path / "cifar.zip"),
        "RUNS": str(tmp_path / "runs"), "SEEDS": "0-19", "CUDA_VISIBLE_DEVICES": "",
        "TRAIN": f"{tiny} --augment=0 --tick=0.008 --samples=0 --device=cpu",
        "SAMPLE": "--solver=ipndm --steps=3 --device=cpu", "SCORE": "--detector=pixels",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run():
        done = subprocess.run(["bash", str(ROOT / "examples/published.sh"), "cifar10-cond"],
                              text=True, env=env, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run().count("\n$ ") + 1 == 4
    folder = tmp_path / "runs/cifar10-cond-2048"
    kept = {path: path.read_bytes() for path in folder.rglob("*")
            if path.suffix in (".pt", ".png", ".jsonl")}
    assert len(list((folder / "pictures").glob("*.png"))) == 64
    scores = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [score["seeds"] for score in scores] == ["0-19", "20-39", "40-59"]
    assert all(score["sampler"]["D"] == 2048 for score in scores)
    again = run()
    assert "Nothing to do" in again and "dataset_tool.py" not in again
    assert {path: path.read_bytes() for path in kept} == kept


def test_the_script_of_published_settings_refuses_other_names():
    done = subprocess.run(["bash", str(ROOT / "examples/published.sh"), "mnist"], text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith("mnist: must be cifar10, ")


def test_num_after_torchrun_needs_the_two_dashes(capsys):
    words = ["--standalone", "--nproc_per_node=8", "fid.py", "calc", "--num", "50000"]
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(words)
    assert "ambiguous option: --num" in capsys.readouterr().err
    launch = get_args_parser().parse_args([*words[:2], "--", *words[2:]])
    assert launch.training_script == "fid.py"
    assert launch.training_script_args == ["calc", "--num", "50000"]


# ------------------------------------------------------------------------- the stand-in world


def write_images(folder, classes, per_class, height, width):
    rng = np.random.default_rng(0)
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 100, [height, width, 3]) + 30 * k
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


def run_own_data(numbers):
    """Runs Python blocks of own-data.md, with less data, in the small world."""
    text = (ROOT / "docs/own-data.md").read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(found) == 5 and "NUM = 4000" in found[0]
    for number in numbers:
        code = stand_in(found[number]).replace("NUM = 4000", "NUM = 12")
        exec(compile(code, f"docs/own-data.md, block {number}", "exec"), {})


def run_dicom_recipe():
    """Runs the Python block of data.md, which writes a restored series; returns its folder."""
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    exec(compile(code, "docs/data.md", "exec"), {})
    return Path("out/L096-QD-dicom")


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless],
                         ids=lambda uid: uid.name)
def test_the_dicom_recipe_writes_a_series_of_its_own_with_the_values_that_are_there(
        tmp_path, monkeypatch, syntax):
    monkeypatch.chdir(tmp_path)
    source, restored = Path("downloads/ct/patients/L096/QD"), Path("out/L096-QD")
    values = np.random.default_rng(0).uniform(-1100, 3100, [3, 1, 8, 12]).astype(np.float32)
    for folder in (source, restored):
        folder.mkdir(parents=True)
    for k in range(3):
        (source / f"L096_QD_{k}.IMA").write_bytes(dicom(
            stored(k), syntax=syntax, SOPInstanceUID=f"1.2.3.{k}", RescaleSlope="0.5",
            ImagePositionPatient=[0, 0, -k], PixelPaddingValue=63536,
            **({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]} if k else {})))
        np.save(restored / f"L096_QD_{k}.npy", values[k])
    files = sorted(run_dicom_recipe().iterdir())
    assert [path.name for path in files] == [f"L096_QD_{k}.IMA" for k in range(3)]
    found = [pydicom.dcmread(path) for path in files]
    for k, (path, ds) in enumerate(zip(files, found, strict=True)):
        assert np.array_equal(ds.pixel_array * ds.RescaleSlope + ds.RescaleIntercept,
                              np.rint(values[k, 0]))
        assert np.array_equal(decode_dicom(path.read_bytes()), np.rint(values[k]))
        assert list(ds.ImagePositionPatient) == [0, 0, -k] and "PixelPaddingValue" not in ds
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        assert list(ds.ImageType) == ["DERIVED", *(["PRIMARY", "AXIAL"] if k else ["SECONDARY"])]
    assert {ds.SeriesInstanceUID for ds in found}.isdisjoint({"1.2.4"})
    assert len({ds.SeriesInstanceUID for ds in found}) == 1
    assert len({ds.SOPInstanceUID for ds in found} - {f"1.2.3.{k}" for k in range(3)}) == 3


def test_the_dicom_recipe_goes_from_a_series_to_a_series(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_ct(tmp_path / "downloads/ct")
    write_ct_network(tmp_path)
    found = [script_and_args(words) for where, words in COMMANDS
             if where == "data.md" and "L096-QD" in " ".join(words)]
    assert [script for script, _ in found] == ["dataset_tool.py", "generate.py"]
    for script, args in found:
        run_documented(script, args)
    files = list(run_dicom_recipe().iterdir())
    assert len(files) == 3
    for path in files:
        expected = np.load(f"out/L096-QD/{path.stem}.npy")
        assert np.array_equal(decode_dicom(path.read_bytes()), np.rint(expected))
        before = decode_dicom((tmp_path / "downloads/ct/patients/L096/QD" / path.name).read_bytes())
        assert np.abs(before - expected).max() > 0


def write_ct_network(root):
    """Writes a network of CT images in HU."""
    (root / "runs/ct").mkdir(parents=True, exist_ok=True)
    write_snapshot(root / "runs/ct/network-snapshot-000000.pt", shape=(1, 8, 8), label_dim=0,
                   dataset={"scale": {"center": [1023.5], "spread": [2047.5]}})


def write_ct(folder):
    """Writes a tensor of slices of two doses, and folders of patients with a series of each."""
    (folder / "patients").mkdir(parents=True)
    values = torch.randn([4, 2, 8, 8], generator=torch.Generator().manual_seed(0)) * 500
    torch.save(values, folder / "slices.pt")
    for i, (patient, dose) in enumerate([(p, d) for p in ("L067", "L096") for d in ("QD", "FD")]):
        (folder / "patients" / patient / dose).mkdir(parents=True)
        for k in range(3):
            path = folder / "patients" / patient / dose / f"{patient}_{dose}_{k}.IMA"
            path.write_bytes(dicom(stored(10 * i + k), ImagePositionPatient=[0, 0, -k]))


def make_world(root):
    """Writes small pictures where the documents keep downloaded data sets."""
    pixels = np.random.default_rng(0).integers(0, 256, [20, 32, 32, 3], np.uint8)
    labels = np.arange(20) % 10
    write_cifar10(root / "downloads/cifar10/cifar-10-python.tar.gz", pixels, labels)
    write_mnist(root / "downloads/mnist", pixels[:, :28, :28, 0], labels)
    photo = io.BytesIO()
    PIL.Image.new("RGB", (40, 30), "teal").save(photo, "WEBP")
    write_lmdb(root / "downloads/lsun/bedroom_train_lmdb", {"0": photo.getvalue()})
    write_ct(root / "downloads/ct")
    write_images(root / "downloads/ffhq/images1024x1024", ["00000", "01000"], 8, 16, 16)
    write_images(root / "downloads/afhqv2", ["test", "train"], 8, 16, 16)
    write_images(root / "downloads/imagenet/ILSVRC/Data/CLS-LOC/train", ["n01", "n02"], 8, 14, 18)
    folder = root / PUBLISHED / "cifar10_ncsnpp_D_2048"
    folder.mkdir(parents=True)
    write_snapshot(folder / "training-state.pt", pfgmpp=True, aug_dim=2048)
    (root / "runs/cifar10-inf").mkdir(parents=True)
    write_snapshot(root / "runs/cifar10-inf/network-snapshot-200000.pt", label_dim=0)
    make_ct_world(root / "downloads")
    write_bare_weights(root / "downloads")
    write_images(root / "photos", ["cats", "dogs"], 8, 36, 40)
    write_tables(root / "downloads")
    (root / "my_parts.py").write_text(parts_of_extending())
    (root / "examples").mkdir()
    for network in (ROOT / "examples").glob("*.pt"):
        (root / "examples" / network.name).symlink_to(network)
    write_dataset(root / "examples/emoji-google-32.zip", side=32, classes=9)
    shutil.copy(ROOT / "examples/digits8.zip", root / "examples")
    np.save(root / "latents.npy", np.random.default_rng(0).normal(size=[16, 4, 16, 16]))
    digits = load_digits()
    np.savez(root / "digits.npz", digits.images.astype(np.uint16)[..., None], digits.target)
    write_restored(root)
    write_ct_network(root)
    for name in ("digits", "digits-D8-seed0", "digits-Dinf-seed0"):
        (root / "runs" / name).mkdir()
        write_snapshot(root / f"runs/{name}/network-snapshot-000000.pt", shape=(1, 8, 8),
                       label_dim=10, dataset={"scale": {"center": [8.0], "spread": [8.0]}})
    run_own_data([0, 2])


def write_tables(downloads):
    """Writes a folder of images with a table of labels, and tables of images."""
    write_images(downloads / "pets", ["one"], 4, 8, 8)
    rows = [f"one/{i}.png,{('cat', 'dog')[i % 2]},{i / 4},{i}\n" for i in range(4)]
    (downloads / "pets.csv").write_text("file_name,label,x,y\n" + "".join(rows))
    images = [{"bytes": (downloads / f"pets/one/{i}.png").read_bytes()} for i in range(4)]
    pq.write_table(pa.table({"image": images, "label": ["cat", "dog"] * 2}),
                   downloads / "pets.parquet")
    (downloads / "cifar100/data").mkdir(parents=True)
    pq.write_table(pa.table({"img": images, "fine_label": [0, 1, 2, 3],
                             "coarse_label": [0, 0, 1, 1]}),
                   downloads / "cifar100/data/train-00000-of-00001.parquet")


def write_bare_weights(downloads):
    """Writes a checkpoint of Lightning, and the options of the run that it is from."""
    content = checkpoint.load(write_snapshot(downloads / "whole.pt", pfgmpp=True))
    tensors = {f"net.{name}": tensor for name, tensor in content["ema"].items()}
    torch.save({"state_dict": tensors, "pytorch-lightning_version": "2.5"}, downloads / "last.ckpt")
    (downloads / "training_options.json").write_text(json.dumps(
        {"network": json_value(content["network"]), "options": content["options"]}))


def make_ct_world(downloads):
    """Writes small slices, and a state of the CT forks."""
    rng = np.random.default_rng(0)
    for name, noise in (("normal-dose", 5), ("low-dose", 60)):
        (downloads / "ct" / name).mkdir(parents=True)
        for i in range(16):
            np.save(downloads / "ct" / name / f"{i:03d}.npy",
                    np.float32(10 * i + noise * rng.normal(size=[8, 8])))
    nets = [ForkDenoiser("cSongUNet", 8, 1, model_channels=8, channel_mult=[1], num_blocks=1)
            for _ in range(2)]
    (downloads / "ppfm").mkdir()
    (downloads / "ppfm/training-state-003201.pt").write_bytes(zip_file(fork_state(*nets, 64)))


def write_restored(root):
    """Writes truths in HU with noisy condition images, and restored ones."""
    rng = np.random.default_rng(0)
    for name, noise in (("datasets/ct-test", 0), ("datasets/ct-test/cond", 60),
                        ("datasets/ct-train", 0), ("runs/ct/restored", 20)):
        (root / name).mkdir(parents=True)
        for k in range(3):
            values = np.linspace(-1000, 1000, 256).reshape(1, 16, 16) + 10 * k
            values = values + noise * rng.standard_normal(values.shape)
            np.save(root / name / f"{k:06d}.npy", values.astype(np.float32))
    scale = {"center": [1023.5], "spread": [2047.5]}
    for name in ("ct-test", "ct-train"):
        (root / f"datasets/{name}/dataset.json").write_text(
            json.dumps({"labels": None, "scale": scale, "cond_scale": scale}))


def stand_in(arg):
    """Returns an argument of the documents as it is in the small world."""
    if match := re.fullmatch(r"--seeds=(\d+)-\d+", arg):
        return f"--seeds={match[1]}-{int(match[1]) + 3}"
    arg = re.sub("(?<=--resolution=)(64x64|32x32)", "8x8", arg)
    arg = arg.replace("hf://uoft-cs/", "hf://downloads/")
    arg = arg.replace("--metrics=fid,kid,pr,is", "--metrics=fid,kid,pr")  # pixels have no classes
    arg = re.sub(r"(?<=--eval=)\d+", "0.008", arg)
    arg = re.sub(r"(?<=--eval-num=)\d+", "4", arg)
    arg = arg.replace("--lr-rampup=0.001", "--lr-rampup=0")  # which must be shorter than the run
    arg = re.sub(r"(?<=network-snapshot-)\d+", "000000", arg)
    arg = re.sub(r"(?<=--ckpt=)\d+", "0", arg)
    arg = re.sub(r"(?<=/ckpt_)\d+", "000000", arg)
    arg = re.sub("(?<=--network=)edm-.*", f"{PUBLISHED}cifar10_ncsnpp_D_2048/training-state.pt",
                 arg)
    return re.sub(r"(?<=--ref=)https://nvlabs-fi-cdn.nvidia.com/edm/", "", arg)


SMALL_TRAIN = ["--duration=0.000016", "--batch=8", "--rbatch=16", "--nblock=1", "--workers=0",
               "--samples=0", "--seed=0", "--device=cpu"]
SMALLER = {
    "generate.py": ["--steps=2", "--batch=4", "--device=cpu"],
    "dataset_tool.py": ["--workers=1"],
    "fid.py calc": ["--num=4", "--detector=pixels", "--workers=0", "--device=cpu"],
    "fid.py gen": ["--seeds=0-3", "--steps=2", "--batch=4", "--detector=pixels", "--workers=0",
                   "--device=cpu"],
    "docs/toy.py": ["--train-steps=2", "--samples=20"],
    "docs/phantoms.py": ["--num=4", "--side=36"],
    "docs/phases.py": ["--num=5"],
    "docs/off_level.py": ["--steps=1"],
    "likelihood.py": ["--steps=2", "--count=4", "--device=cpu"],
    "distill.py": ["--duration=0.000016", "--batch=8", "--workers=0", "--samples=0", "--seed=0",
                   "--device=cpu"],
    "fid.py classifier": ["--hidden=16", "--shift=0"],
    "fid.py nearest": ["--detector=pixels", "--workers=0", "--device=cpu"],
    "fid.py ref": ["--detector=pixels", "--workers=0", "--device=cpu"],
}
PRESET_SMALLER = ["--batch=4", "--device=cpu"]  # with the published lists


def run(script, args):
    done = CliRunner().invoke(SCRIPTS[script], args)
    text = f"{script} {shlex.join(args)}\n{done.output}"
    assert done.exit_code == 0, f"{text}\n{done.exception!r}"
    return done.output


def find_detector(args):
    """Returns the documented flag, for --detector=pixels has no classes."""
    return next(arg for arg in args if arg.startswith("--detector="))


def run_documented(script, documented):
    args = [stand_in(arg) for arg in documented]
    if importlib.util.find_spec("tensorboard") is None:
        args = [arg for arg in args if arg != "--log=tensorboard"]
    if script == "train.py":
        # The values as documented; the small world's states to resume have other ones.
        fresh = [arg for arg in args if arg != "--resume=auto"]
        run(script, [*fresh, "--device=cpu", "--dry-run"])
        # ADM's attention has heads of 64 channels.
        is_adm = {"--arch=adm", "--preset=imagenet64-adm"} & set(args)
        size = ["--cbase=64", "--cres=1"] if is_adm else ["--cbase=8", "--cres=1,2"]
        score = ["--eval-detector=pixels"] if "--eval-num=4" in args else []
        run(script, [*args, *SMALL_TRAIN, *size, *score])
    elif script == "fid.py":
        for name in re.findall(r"edm/fid-refs/([\w-]+)\.npz", " ".join(documented)):
            run(script, ["ref", f"--data=datasets/{name}.zip", f"--dest=fid-refs/{name}.npz",
                         *SMALLER["fid.py ref"]])
        smaller = SMALLER.get(f"fid.py {args[0]}", ())
        if "--metrics=ca" in args:
            assert "class accuracy\n" in run(script, [*args, *smaller, find_detector(args)])
            return
        output = run(script, [*args, *smaller])
        if args[0] == "pairs":
            assert re.search(r"\npsnr \d\d\.\d\d \+- .*\([34] images\)\n", output)
            return
        if args[0] == "nearest":
            assert re.search(r"^nearest: median distance [\d.]+ \(\d+ images\), 0 exact", output,
                             re.M)
            return
        shown = r"pixels Frechet distance: [\d.e+-]+\n|pixels kernel distance"
        assert args[0] in ("ref", "classifier") or re.search(shown, output)
    elif script in ("checkpoint_tool.py", "report.py", "runs.py"):
        run(script, args)
    elif script in ("docs/results.py", "docs/study.py", "benchmarks"):
        pass  # need a study, and minutes: tests/test_results.py and test_benchmarks.py run them
    elif script == "sweep.py":  # tests/reports/test_study.py runs a study
        assert "fid.py gen" in run(script, ["--dry-run", *args])
    elif any("cifar-10-python" in arg for arg in args):
        assert "20 images, 32x32" in run(script, args)
        run(script, [*args, "--resolution=8x8"])  # for what comes after
    elif script in PRESETS:
        run(script, [*args, *PRESET_SMALLER])
    elif args[:1] == ["split"]:  # takes no --workers
        run(script, args)
    else:
        smaller = SMALLER[script]
        if any(arg.startswith("--sigmas=") for arg in args):  # which are the steps
            smaller = [arg for arg in smaller if not arg.startswith("--steps=")]
        run(script, [*args, *smaller])


@pytest.mark.slow
def test_the_commands_of_the_readme_run_on_stand_in_data(tmp_path, monkeypatch):
    run_commands([command for command in COMMANDS if command[0] == "README.md"], tmp_path,
                 monkeypatch)


def run_commands(found, tmp_path, monkeypatch):
    """Runs (file, words) in a small world, those that make data sets first."""
    monkeypatch.chdir(tmp_path)
    # Of networks in their full size: tests/training/test_presets.py computes some.
    monkeypatch.setattr("training.estimate.describe", lambda *args: "an estimate")
    make_world(tmp_path)
    commands = [script_and_args(words) for _, words in found]
    first = ["docs/phantoms.py", "dataset_tool.py"]  # else in their order
    commands.sort(key=lambda command: first.index(command[0]) if command[0] in first else 2)
    with registries_kept():
        for script, args in commands:
            run_documented(script, args)


@pytest.mark.slow
def test_documented_commands_run_on_stand_in_data(tmp_path, monkeypatch):
    run_commands(COMMANDS, tmp_path, monkeypatch)
    run_own_data([1, 3, 4])
    assert len(list(run_dicom_recipe().iterdir())) == 3
    for name in ("toy", "noise-norms", "phases"):
        assert PIL.Image.open(tmp_path / f"docs/{name}.png").size > (1000, 400)
    for name in ("fields", "sharpened", "guided"):
        assert PIL.Image.open(tmp_path / f"runs/{name}.png").size > (200, 100)
    run_dir = tmp_path / "runs/cifar10-2048"
    for folder, first in (("ckpt", 0), ("ckpt_2", 50000), ("ckpt_3", 100000)):
        assert (run_dir / f"{folder}_000000/{first:06d}/{first:06d}.png").exists()
    assert {path.name for path in (tmp_path / "out/vis").iterdir()} == {"grid.png", "movie.gif"}


# ----------------------------------------------------------------------- help, names, links


def make_help():
    return load_script("docs/make_help.py")


def test_help_texts_are_what_the_scripts_print():
    texts = make_help().help_texts()
    assert set(texts) == {path.name for path in (ROOT / "docs").glob("*-help.txt")}
    for name, text in texts.items():
        written = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert written == text, f"docs/{name} is out of date: run `python docs/make_help.py`"
        assert max(map(len, text.splitlines())) <= make_help().WIDTH


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_leaves_lines_of_examples_alone(script):
    output = CliRunner().invoke(SCRIPTS[script], ["--help"]).output
    assert "\\b" not in output, "click's mark for such lines is printed: is the docstring raw?"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        name, _, heading = target.partition("#")
        page = path.parent / name if name else path
        assert page.exists(), target
        if heading:
            assert heading in {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
                               for title in re.findall(r"^#+ (.*)$", page.read_text(
                                   encoding="utf-8"), re.M)}, target


@pytest.mark.parametrize("page, header, at_least", [
    ("reliability.md", "| fault ", 31), ("mathematics.md", "| proposition ", 8)])
def test_every_row_names_tests_that_exist(page, header, at_least):
    rows = table(ROOT / "docs" / page, header)
    there = {name for path in (ROOT / "tests").rglob("test_*.py")
             for name in re.findall(r"^def test_(\w+)", path.read_text(encoding="utf-8"), re.M)}
    assert len(rows) >= at_least
    for first, *_, names in rows:
        named = re.findall(r"`(\w+)`", names)
        assert named and set(named) <= there, f"{first}: {set(named) - there}"


def test_first_two_make_lines_are_demo_and_test():
    lines = [line for line in "".join(blocks(ROOT / "README.md")).splitlines()
             if line.startswith("make ")]
    assert lines[:2] == ["make demo", "make test"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {line.split()[1] for line in lines} <= set(targets)


def resolve(module_name, dotted):
    value = importlib.import_module(module_name)
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def test_mathematics_names_existing_code():
    text = (ROOT / "docs/mathematics.md").read_text(encoding="utf-8")
    found = re.findall(r"^Code: `([\w/]+)\.py`: (.*?)(?=\n\n|\nCode:|\Z)", text, re.M | re.S)
    sections = text.split("\n## ")[1:]
    assert len(found) >= len(sections) >= 15
    for section in sections:
        assert "\nCode: `" in section, section.splitlines()[0]
    for file, names in found:
        for dotted in re.findall(r"`([\w.]+)`", names):
            assert resolve(file.replace("/", "."), dotted) is not None


def test_migration_names_every_flag_and_existing_imports():
    text = (ROOT / "docs/migration.md").read_text(encoding="utf-8")
    parts = {part.splitlines()[0]: part for part in text.split("\n## ")}
    for script, command in SCRIPTS.items():
        if script in PRESETS | {"distill.py", "likelihood.py", "checkpoint_tool.py", "sweep.py",
                                "report.py", "runs.py", "docs/toy.py", "docs/results.py",
                                "docs/phantoms.py", "docs/phases.py", "docs/study.py",
                                "docs/off_level.py", "benchmarks"}:
            continue  # the references have no counterpart; the flags are those of generate.py
        for each in (command, *getattr(command, "commands", {}).values()):
            flags = {flag for option in each.params for flag in option.opts if flag[0] == "-"}
            if each.name == "gen":  # its flags of sampling are described with generate.py
                flags -= SAMPLING_FLAGS
            missing = {flag for flag in flags if f"`{flag}`" not in parts[script]
                       and f"{each.name} {flag}`" not in parts[script]}
            assert not missing, f"{script}: {missing}"
    rows = parts["Where it is in EDM, where it is here"].splitlines()
    here = [row.split("|")[2] for row in rows if row.startswith("| `")]
    names = re.findall(r"`((?:dnnlib|images|pfgmpp|metrics|training)\.\w+)\.(\w+)`", " ".join(here))
    assert len(names) > 15
    for module, name in names:
        resolve(module, name)


def test_training_names_every_flag_by_its_purpose():
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    part = text.split("\n## Flags by purpose\n")[1].split("\n## ")[0]
    flags = [option.opts[-1] for option in SCRIPTS["train.py"].params]
    named = re.findall(r"`(--[\w-]+)`", part)
    assert sorted(named) == sorted(flags), "each once"


# ------------------------------------------------------------------------------------ numbers


def table(path, first_header):
    """Returns the cells of the rows of the table whose header begins so."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(first_header))
    rows = []
    for line in lines[start + 2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


TRANSFER = ROOT / "docs/transfer.md"
FOUR_DIGITS = 6e-4  # relative: the tables give four digits


def test_quantiles_of_the_noise_are_those_of_the_chi_square_law():
    rows = table(TRANSFER, "| D | 1% |")
    assert len(rows) >= 7
    for row in rows:
        D = float(row[0])
        expected = [np.sqrt(D / stats.chi2.ppf(1 - p, D)) for p in (0.01, 0.5, 0.99, 0.999)]
        assert [float(cell) for cell in row[1:5]] == pytest.approx(expected, rel=FOUR_DIGITS)
        if D > 2:
            assert float(row[5]) == pytest.approx(D / (D - 2), rel=FOUR_DIGITS)
        else:
            assert row[5] == "infinite"


def test_radii_of_the_worked_examples():
    edm = [[float(cell) for cell in row[1:]] for row in table(TRANSFER, "| | sigma |")]
    ddpm = [[float(cell) for cell in row] for row in table(TRANSFER, "| t | abar_t |")]
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for t, alpha, sigma, *_ in ddpm:
        assert alpha == pytest.approx(abar[int(t) - 1], rel=FOUR_DIGITS)
        assert sigma == pytest.approx(np.sqrt((1 - abar[int(t) - 1]) / abar[int(t) - 1]),
                                      rel=FOUR_DIGITS)
    assert len(edm) == 4 and len(ddpm) == 4
    for sigma, *radii in [*edm, *(row[2:] for row in ddpm)]:
        assert radii == pytest.approx([sigma * 128**0.5, sigma * 2048**0.5], rel=2 * FOUR_DIGITS)


# ----------------------------------------------------------------------------------- versions


def requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def test_environment_has_the_packages_of_requirements():
    text = (ROOT / "environment.yml").read_text()
    above, _, below = text.partition("- pip:\n")
    assert re.findall(r"^ +- (\S+)$", below, re.M) == requirements()
    minor = int(re.search(r"- python=3\.(\d+)$", above, re.M)[1])
    assert 10 <= minor <= 13  # what README promises


def test_dockerfile_installs_requirements_before_code_as_another_user_than_root():
    text = (ROOT / "Dockerfile").read_text()
    code = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ")
    steps = [line for line in code.splitlines() if line.strip()]
    [base] = [line.split()[1] for line in steps if line.startswith("FROM")]
    assert re.fullmatch(r"[\w./]+:\d+\.\d+\.\d+[\w.-]*", base), "pinned to a patch release"
    installs = [line for line in steps if "pip install" in line]
    assert len(installs) == 1 and "pip install --requirement /tmp/requirements.txt" in installs[0]
    order = [steps.index("COPY requirements.txt /tmp/requirements.txt"), steps.index(installs[0]),
             steps.index("COPY . /workspace")]
    assert order == sorted(order)
    users = [line.split()[1] for line in steps if line.startswith("USER")]
    assert users and users[-1].split(":")[0] not in ("root", "0")
    assert "torchrun" in text


def test_dockerfile_names_the_versions_of_requirements_and_of_its_base():
    text = (ROOT / "Dockerfile").read_text()
    [torch_version] = [line.split("==")[1] for line in requirements() if line.startswith("torch==")]
    assert set(re.findall(r"torch[ =](?:==)?(\d+\.\d+\.\d+)", text)) == {torch_version}
    cuda = re.search(r"^FROM nvidia/cuda:(\d+\.\d+)\.", text, re.M)[1]
    assert f"torch.version.cuda.startswith('{cuda}')" in text
    assert f"CUDA {cuda}" in text
