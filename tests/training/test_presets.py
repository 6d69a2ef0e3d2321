"""Presets, --config and what a dry run says: every flag has one home, and what is typed wins."""

import contextlib
import json
import re
import shlex

import pytest
import torch
from scripts import ROOT
from tiny import TINY_NETWORK, TINY_RUN

import train
from checkpoints import checkpoint
from images.dataset import ImageFolderDataset
from pfgmpp.networks import build_network
from pfgmpp.unets import UNetBlock
from training.config import TrainConfig
from training.estimate import Estimate, describe, num_files
from training.launch import config_values
from training.presets import PRESETS
from training.trainer import Trainer

DATA = {"cifar10": (32, 0), "ffhq64": (64, 0), "afhqv2": (64, 0), "imagenet64": (64, 1000),
        "lsun256": (256, 0), "emoji32": (32, 9), "digits8": (8, 10)}


def options(*args):
    """Returns what a command line of train.py comes to."""
    words = ["--outdir=runs", "--data=data.zip", *args]
    context = train.main.make_context("train.py", words)
    return TrainConfig(**config_values(context))


@pytest.mark.long
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_run_that_can_be_built(name):
    config = options(f"--preset={name}")
    assert config.preset == name
    assert {key: getattr(config, key) for key in PRESETS[name]} == PRESETS[name]
    assert not config.pfgmpp, "D is no part of a preset"
    resolution, classes = DATA[name.split("-")[0]]
    with torch.device("meta"):
        build_network(config.network(resolution, 3, classes if config.cond else 0))


def published_commands():
    """Yields (preset, flags) of the commands of migration.md that spell out a published run."""
    text = (ROOT / "docs/migration.md").read_text(encoding="utf-8").replace("\\\n", " ")
    for preset, line in re.findall(r"^# the same as --preset=(\S+).*\n(torchrun .*)", text, re.M):
        words = shlex.split(line)
        yield preset, [word for word in words[words.index("train.py") + 1:]
                       if not word.startswith(("--outdir", "--name", "--data"))]


def test_presets_are_the_published_commands():
    commands = dict(published_commands())
    assert len(commands) == 4
    for preset, flags in commands.items():
        spelled, named = options(*flags).to_dict(), options(f"--preset={preset}").to_dict()
        differ = {key for key in named if named[key] != spelled[key]}
        assert differ <= {"preset", "pfgmpp", "aug_dim", "seed"}, (preset, differ)


@pytest.mark.parametrize("D", ["8", "inf"])
def test_the_digits_of_the_examples_were_trained_by_their_preset(D):
    """All but how often states were written; sigma_data was measured."""
    recorded = checkpoint.load(ROOT / f"examples/digits8-{D}.pt")["options"]
    preset = options("--preset=digits8").to_dict()
    assert {key for key in PRESETS["digits8"] if recorded[key] != preset[key]} == {
        "dump", "sigma_data"}


def test_the_table_of_presets_says_what_they_set():
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    table = text[text.index("| preset |"):].split("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    flags = ["", *(f"--{name}" for name in header[1:-1])]
    flags[header.index("Mimg")] = "--duration"
    assert [row[0] for row in rows] == list(PRESETS)
    for name, *cells, other in rows:
        written = [f"{flag}={cell}" for flag, cell in zip(flags[1:], cells, strict=True)]
        config = options(*written, *other.strip("`").split()).to_dict() | {"preset": name}
        assert config == options(f"--preset={name}").to_dict()


@pytest.mark.parametrize("word, ares", [("none", ()), ("16", (16,)), ("32,16,8", (32, 16, 8))])
def test_attention_resolutions_are_a_list_or_none(word, ares, tmp_path):
    config = options(f"--ares={word}")
    assert config.ares == ares and TrainConfig.from_dict(config.to_dict()) == config
    path = tmp_path / "options.json"
    path.write_text(json.dumps(config.to_dict()))
    assert options(f"--config={path}").ares == ares
    assert options().ares is None


@pytest.mark.long
@pytest.mark.parametrize("flags, processes, expected", [
    (["--preset=imagenet64-adm", "--batch=100"], 1, '"batch_gpu": 25,'),
    (["--preset=lsun256", "--batch=60"], 5, '"batch_gpu": 6,'),
    (["--config=FILE"], 3, '"batch_gpu": 5,'),
    (["--config=FILE"], 1, '"batch_gpu": 5,'),
    (["--config=FILE", "--batch-gpu=5"], 3, '"batch_gpu": 5,'),
    (["--config=FILE", "--batch-gpu=4"], 3, "Error: --batch-gpu=4 must divide --batch=15 / 3 "
                                            "process(es) = 5; nearest: 1 or 5"),
    (["--preset=lsun256", "--batch-gpu=7"], 1, "Error: --batch-gpu=7 must divide --batch=256 / 1 "
                                               "process(es) = 256; nearest: 4 or 8"),
], ids=str)
def test_a_batch_gpu_that_nobody_typed_fits_itself(flags, processes, expected, dataset_zip,
                                                   tmp_path, invoke, monkeypatch):
    (tmp_path / "some.json").write_text(json.dumps({"batch": 15, "batch_gpu": 7}))
    flags = [flag.replace("FILE", str(tmp_path / "some.json")) for flag in flags]
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr("torch_utils.distributed.process_group",
                        lambda device: contextlib.nullcontext(torch.device("cpu")))
    result = invoke(train.main, f"--outdir={tmp_path / 'out'}", f"--data={dataset_zip}", *flags,
                    "--cond=0", "--cbase=64", "--cres=1", "--nblock=1", "-n")
    assert expected in result.output
    assert result.exit_code == (2 if expected.startswith("Error") else 0), result.output


def test_flags_that_are_typed_come_before_a_preset_and_a_config(tmp_path):
    config = options("--preset=imagenet64-adm", "--lr=0.5", "--cond=0", "--tick=50")
    assert (config.lr, config.cond, config.tick, config.batch) == (0.5, False, 50, 4096)
    assert options("--lr=0.5", "--preset=imagenet64-adm") == options(
        "--preset=imagenet64-adm", "--lr=0.5"), "the order does not matter"
    assert config.precision == "fp16"
    assert options("--preset=imagenet64-adm", "--fp16=0").precision == "fp32"
    assert options("--preset=imagenet64-adm", "--precision=bf16").precision == "bf16"
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"lr": 0.25, "precision": "tf32", "batch": 64, "rbatch": 64}))
    assert options(f"--config={path}").lr == 0.25
    config = options(f"--config={path}", "--lr=0.5", "--fp16=1")
    assert (config.lr, config.precision, config.batch) == (0.5, "fp16", 64)


@pytest.mark.long
def test_a_config_gives_back_the_run_that_wrote_it(dataset_zip, tmp_path, invoke):
    flags = ["--pfgmpp=1", "--aug_dim=inf", "--cond=1", "--compile=0", "--keep=3", "--xflip=1",
             "--deterministic=0", "--duration=0.000008", "--sigma-data=auto"]
    result = invoke(train.main, f"--outdir={tmp_path}", "--name=run", f"--data={dataset_zip}",
                    *TINY_RUN, *flags)
    assert result.exit_code == 0, result.output
    written = tmp_path / "run/training_options.json"
    first = json.loads(written.read_text())["options"]
    result = invoke(train.main, f"--outdir={tmp_path}", f"--config={written}", "-n")
    assert result.exit_code == 0, result.output
    again = json.JSONDecoder().raw_decode(result.output)[0]
    assert TrainConfig.from_dict(again).to_dict() == first and again["data"] == str(dataset_zip)
    result = invoke(train.main, f"--outdir={tmp_path}", "--name=run", f"--config={written}",
                    "--resume=auto")
    assert "Nothing to do" in result.output, result.output


def test_every_option_survives_the_way_through_a_config(tmp_path):
    given = TrainConfig(
        data="x", cond=True, arch="adm", cres=(1, 2), cbase=64, nblock=2, batch_gpu=4, stf=True,
        P_mean=-0.4, P_std=1.0, ares=(), checkpoint_blocks=True, clip_grad=2.5,
        lr_decay="rsqrt", lr_decay_start=1.5,
        aug_dim=float("inf"), pfgmpp=True, sigma_data=None, label_dropout=0.1, ls=2.0, keep=3,
        augment=0.0, compile="1", workers=0, samples=0, eval=3.0, eval_ref="ref.npz", seed=7,
        transfer="y.pt", preset="emoji32", precision="bf16")
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"options": given.to_dict(), "dataset": {}, "network": {}}))
    assert options(f"--config={path}", "--data=x").to_dict() | {"data": "x"} == given.to_dict()


@pytest.mark.parametrize("content, words", [
    ('{"bacth": 3}', ["'bacth'", "'batch'"]),
    ('{"options": {"batch-gpu": 3}}', ["'batch-gpu'", "'batch_gpu'"]),
    ('{"lr": "high"}', ["'lr'", "'high'"]),
    ("[1]", ["not a JSON object"]),
    ('{"options": 3}', ["not a JSON object"]),
    ('{"lr": ', ["not a JSON file", "line 1"]),
    (None, ["No such file"]),
])
def test_a_bad_config_gets_one_line(content, words, dataset_zip, tmp_path, invoke):
    path = tmp_path / "some.json"
    if content is not None:
        path.write_text(content)
    result = invoke(train.main, f"--outdir={tmp_path / 'out'}", f"--data={dataset_zip}",
                    f"--config={path}")
    assert result.exit_code == 2
    [line] = result.output.splitlines()
    assert all(word in line for word in [f"Error: --config={path}", *words]), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, words", [
    (["--preset=cifar10"], ["'cifar10'", "'cifar10-ncsnpp'"]),
    (["--preset=emoji32", "--config=FILE"], ["--preset and --config: choose one"]),
    (["--rate=100"], ["--rate: must be used with --dry-run"]),
    (["-n", "--rate=0"], ["--rate"]),
    (["--presets=emoji32"], ["--presets", "--preset"]),
])
def test_bad_use_of_the_new_flags_gets_one_line(flags, words, dataset_zip, tmp_path, invoke):
    (tmp_path / "some.json").write_text("{}")
    flags = [flag.replace("FILE", str(tmp_path / "some.json")) for flag in flags]
    result = invoke(train.main, f"--outdir={tmp_path}", f"--data={dataset_zip}", *flags)
    assert result.exit_code == 2
    [line] = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert all(word in line for word in words), line


@pytest.mark.long
def test_without_arguments_it_says_what_is_missing_and_how_to_start(tmp_path, invoke):
    result = invoke(train.main)
    assert result.exit_code == 2
    error, hint = result.output.splitlines()
    assert error.startswith("Error: ") and "--outdir" in error and "--data" in error
    words = shlex.split(hint.partition(": ")[2])
    assert words[0] == "python" and words[1].endswith("train.py")
    args = [word if not word.startswith("--outdir") else f"--outdir={tmp_path}"
            for word in words[2:]]
    result = invoke(train.main, *args, "-n")
    assert result.exit_code == 0 and "1906 images 3x32x32" in result.output
    one = invoke(train.main, "--outdir", "x").output.splitlines()[0]
    assert "--data" in one and "--outdir" not in one
    (tmp_path / "some.json").write_text('{"data": "x.zip"}')
    one = invoke(train.main, f"--config={tmp_path / 'some.json'}").output.splitlines()[0]
    assert "--outdir" in one and "--data" not in one


# --------------------------------------------------------------------------------- estimates


def network(arch="ncsnpp", resolution=16, precision="fp32", **kwargs):
    config = TrainConfig(data="x", arch=arch, **({"cbase": 64, "cres": (1, 2), "nblock": 1}
                                                 | kwargs))
    return config.network(resolution, 3, 2)


def kept_bytes(content, batch, checkpoint_blocks=False):
    """Returns the bytes that a real forward pass of a real network keeps, parameters left out."""
    return run_and_keep(content, batch, checkpoint_blocks)[0]


def kept_by_blocks(content, batch):
    """Returns the same of each block by itself, in the order in which they run."""
    return run_and_keep(content, batch, False)[1]


def run_and_keep(content, batch, checkpoint_blocks):
    net = build_network(content)
    net.model.checkpoint_blocks = checkpoint_blocks
    known = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def add(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor
    side = content["img_resolution"]
    labels = torch.zeros(batch, 9) if content.get("augment_dim") else None
    def total():
        return sum(t.untyped_storage().nbytes() for t in kept.values())
    at_blocks = []
    for block in net.modules():
        if isinstance(block, UNetBlock):
            block.register_forward_pre_hook(lambda *_: at_blocks.append(total()))
            block.register_forward_hook(lambda *_: at_blocks.append(total()))
    with torch.autograd.graph.saved_tensors_hooks(add, lambda tensor: tensor):
        net(torch.zeros(batch, 3, side, side), torch.ones(batch), torch.zeros(batch, 2),
            augment_labels=labels)
    by_blocks = [after - before for before, after in zip(at_blocks[::2], at_blocks[1::2],
                                                         strict=True)]
    return total(), by_blocks


@pytest.mark.long
@pytest.mark.parametrize("arch", ["ncsnpp", "ddpmpp", "adm"])
def test_memory_of_an_image_is_what_autograd_keeps_of_a_real_one(arch):
    content = network(arch)
    measured = (kept_bytes(content, 5) - kept_bytes(content, 2)) / 3
    assert Estimate.of_network(content).image_bytes == pytest.approx(measured, rel=0.02)


@pytest.mark.long
@pytest.mark.parametrize("arch", [
    "ncsnpp", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("ddpmpp", "adm"))])
def test_with_checkpoints_an_image_takes_what_is_kept_and_the_largest_block(arch):
    content = network(arch, nblock=4)
    found, plain = (Estimate.of_network(content, checkpoint_blocks=checkpoint_blocks)
                    for checkpoint_blocks in (True, False))
    measured = (kept_bytes(content, 5, True) - kept_bytes(content, 2, True)) / 3
    largest = max((five - two) / 3 for five, two in zip(
        kept_by_blocks(content, 5), kept_by_blocks(content, 2), strict=True))
    assert found.image_bytes == pytest.approx(measured + largest, rel=0.03)
    assert found.image_bytes < 0.5 * plain.image_bytes
    assert found.training_flops / found.forward_flops == pytest.approx(4, rel=0.05), "one more"
    assert (found.parameters, found.forward_flops) == (plain.parameters, plain.forward_flops)


@pytest.mark.long
@pytest.mark.parametrize("flags", [
    pytest.param(
        ["--duration=0.00008", "--tick=0.016", "--snap=2", "--dump=1"],
        marks=pytest.mark.slow),
    pytest.param(
        ["--duration=0.000075", "--tick=0.024", "--snap=1", "--dump=2"],
        marks=pytest.mark.slow),
    pytest.param(
        ["--duration=0.000064", "--tick=0.024", "--snap=3", "--dump=2"],
        marks=pytest.mark.slow),
    ["--duration=0.000008", "--tick=0.024", "--snap=1", "--dump=1"],
    ["--duration=0.00008", "--tick=0.008", "--snap=4", "--dump=1", "--keep=3"]], ids=str)
def test_a_dry_run_says_what_the_run_leaves_on_the_disk(flags, dataset_zip, tmp_path, invoke):
    args = [f"--outdir={tmp_path}", "--name=run", f"--data={dataset_zip}", *TINY_RUN, *flags]
    told = invoke(train.main, *args, "-n").stdout
    result = invoke(train.main, *args)
    assert result.exit_code == 0, result.output
    snapshots, states = (list(tmp_path.glob(f"run/{kind}-*.pt"))
                         for kind in ("network-snapshot", "training-state"))
    [line] = re.findall("^Disk +(.*)$", told, re.M)
    assert f": snapshots {len(snapshots)} x " in line and f", states {len(states)} x " in line
    options = json.loads((tmp_path / "run/training_options.json").read_text())["options"]
    config = TrainConfig.from_dict(options)
    assert config.keep or num_files(config) == (len(snapshots), len(states))


@pytest.mark.long
def test_snapshots_and_states_are_as_large_as_a_dry_run_says(dataset_zip, tmp_path):
    config = TrainConfig(data=str(dataset_zip), arch="ncsnpp", cbase=64, cres=(1, 2), nblock=1,
                         batch=8, workers=0, augment=0.0)
    trainer = Trainer(config, ImageFolderDataset(dataset_zip), torch.device("cpu"))
    trainer.start()
    trainer.train_step()
    text = describe(config, config.network(8, 3, 0), 1)
    said = re.search(r"snapshots \d+ x ([0-9.]+) MB, states \d+ x ([0-9.]+) MB", text).groups()
    for size, content in zip(said, (trainer.snapshot(), trainer.state()), strict=True):
        checkpoint.save(tmp_path / "x.pt", content)
        assert (tmp_path / "x.pt").stat().st_size / 1e6 == pytest.approx(float(size), rel=0.02)


@pytest.mark.long
def test_half_precision_halves_what_is_kept():
    content = network()
    full, half = (Estimate.of_network(content, precision).image_bytes
                  for precision in ("fp32", "fp16"))
    assert 0.4 < half / full < 0.65


@pytest.mark.long
def test_operations_are_those_of_convolutions_and_backward_takes_twice_forward():
    found = Estimate.of_network(network("adm", cbase=64))
    wider = Estimate.of_network(network("adm", cbase=128))
    assert wider.forward_flops / found.forward_flops == pytest.approx(4, rel=0.1)
    assert found.training_flops / found.forward_flops == pytest.approx(3, rel=0.01)


@pytest.mark.long
def test_the_cifar10_network_has_the_published_size():
    config = TrainConfig(data="x", **PRESETS["cifar10-ncsnpp"])
    found = Estimate.of_network(config.network(32, 3, 0))
    assert found.parameters == 56_397_827
    assert found.state_bytes == pytest.approx(20 * found.parameters, rel=0.01)


@pytest.mark.long
def test_a_dry_run_says_what_the_run_takes(dataset_zip, tmp_path, invoke):
    result = invoke(train.main, f"--outdir={tmp_path / 'new'}", f"--data={dataset_zip}", "-n",
                    *TINY_NETWORK, "--batch=100", "--batch-gpu=50", "--duration=0.36",
                    "--rate=100")
    assert result.exit_code == 0, result.output
    assert "Steps      3,600 of 100 images" in result.output
    assert "1h 00m 00s (1 hours) at 100 images/s" in result.output
    for word in ("Parameters", "FLOP per image forward", "(an estimate)", "+ 50 x"):
        assert word in result.output
    less = invoke(train.main, f"--outdir={tmp_path / 'new'}", f"--data={dataset_zip}", "-n",
                  *TINY_NETWORK, "--batch=100", "--batch-gpu=50", "--checkpoint-blocks=1")
    [before], [after] = (re.findall(r"50 x ([\d.]+) kB per image", output)
                         for output in (result.output, less.output))
    assert float(after) < float(before)
    assert not (tmp_path / "new").exists()
