import json
import math
import re

import pytest
import torch
from scripts import ROOT, run_script
from tiny import TINY_NETWORK, TINY_RUN, write_dataset

import train
from checkpoints.checkpoint import digest, load
from images.dataset import ImageFolderDataset
from pfgmpp.networks import build_network
from training.config import TrainConfig
from training.trainer import Trainer


def states(run_dir):
    return sorted(run_dir.glob("training-state-*.pt"))


def losses(run_dir):
    lines = (run_dir / "stats.jsonl").read_text().splitlines()
    return [json.loads(line)["Loss/loss"]["mean"] for line in lines]


@pytest.fixture(scope="module")
def undisturbed(dataset_zip, tmp_path_factory):
    """A run of 10 steps with dropout, augmentation, conditions and PFGM++ noise."""
    from click.testing import CliRunner
    outdir = tmp_path_factory.mktemp("undisturbed")
    args = [f"--outdir={outdir}", "--name=run", f"--data={dataset_zip}", "--cond=1", "--pfgmpp=1",
            "--tick=0.008", "--dump=3", "--snap=4", *TINY_RUN, "--duration=0.00008"]
    result = CliRunner().invoke(train.main, args)
    assert result.exit_code == 0, result.output
    return outdir / "run", args


@pytest.mark.long
def test_a_resumed_run_is_byte_identical_to_an_undisturbed_one(undisturbed, tmp_path, invoke):
    run_dir, args = undisturbed
    args = [a for a in args if not a.startswith(("--outdir", "--duration"))]
    half = [*args, f"--outdir={tmp_path}"]
    assert invoke(train.main, *half, "--duration=0.00004").exit_code == 0
    result = invoke(train.main, *half, "--duration=0.00008", "--resume=auto")
    assert result.exit_code == 0 and "Resuming from" in result.output
    name = "training-state-000000.080.pt"
    whole, resumed = load(run_dir / name), load(tmp_path / "run" / name)
    for part in ("net", "ema", "optimizer", "progress"):
        assert digest(whole[part]) == digest(resumed[part]), part
    assert digest(whole["net"]) != digest(load(run_dir / "training-state-000000.056.pt")["net"])


@pytest.mark.long
def test_a_run_directory_has_the_promised_files(undisturbed):
    run_dir, _ = undisturbed
    names = {path.name for path in run_dir.iterdir()}
    assert {"log.txt", "stats.jsonl", "training_options.json"} <= names
    # Ticks of one step: tick 0 after step 1 writes a snapshot, no state.
    assert [p.name for p in states(run_dir)] == [
        f"training-state-000000.{n:03d}.pt" for n in (32, 56, 80)]
    assert {f"network-snapshot-000000.{n:03d}.pt" for n in (8, 40, 72, 80)} <= names
    options = json.loads((run_dir / "training_options.json").read_text())
    assert options["options"]["aug_dim"] == 128 and options["options"]["seed"] == 3
    assert {"commit", "torch", "device", "world_size"} <= set(options["provenance"])
    assert TrainConfig.from_dict(options["options"]).D == 128


def test_stats_say_what_happened(undisturbed):
    run_dir, _ = undisturbed
    rows = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert [row["Progress/kimg"]["mean"] for row in rows] == pytest.approx(
        [0.008 * (k + 1) for k in range(10)])
    assert all(row["Loss/loss"]["num"] == 8 * 3 * 8 * 8 for row in rows)
    for key in ("Progress/tick", "Timing/total_sec", "Timing/sec_per_tick", "Timing/sec_per_kimg",
                "Timing/maintenance_sec", "Resources/cpu_mem_gb", "Resources/peak_gpu_mem_gb",
                "Resources/peak_gpu_mem_reserved_gb", "timestamp"):
        assert key in rows[0], key


def test_every_field_of_stats_is_documented(undisturbed):
    run_dir, _ = undisturbed
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8").split("\n## stats.jsonl")[1]
    documented = set(re.findall(r"^\| `([\w/]+)` \|", text, re.M))
    for line in (run_dir / "stats.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == documented - {"Metrics/fid", "Loss/val"}


@pytest.mark.long
def test_the_first_step_has_learning_rate_zero(undisturbed):
    run_dir, _ = undisturbed
    first = load(run_dir / "network-snapshot-000000.008.pt")["ema"]
    torch.manual_seed(0)
    from torch_utils.misc import mix_seed
    from training.trainer import _INIT_TAG
    content = load(run_dir / "training-state-000000.080.pt")
    torch.manual_seed(mix_seed(3, _INIT_TAG))
    assert digest(dict(build_network(content["network"]).state_dict())) == digest(first)


@pytest.mark.scripts
def test_world_size_and_batch_gpu_change_nothing_but_rounding(dataset_zip, tmp_path, invoke):
    args = [f"--outdir={tmp_path}", f"--data={dataset_zip}", "--cond=1", "--pfgmpp=1",
            "--tick=0.008", *TINY_RUN, "--dropout=0", "--duration=0.00004", "--device=cpu"]

    def run(*args):
        result = invoke(train.main, *args)
        assert result.exit_code == 0, result.output

    run(*args, "--name=one")
    run(*args, "--name=rounds", "--batch-gpu=2")
    run_script("train.py", *args, "--name=two", "--batch-gpu=2", "--workers=1", processes=2)
    # Other draws or gradients change losses by percents. Rounding does by 1e-8 at first, and by
    # twice as much with each step, for Adam divides gradients near 0 by their size.
    rounding, of_ten_steps = 1e-4, 1e-3
    expected = losses(tmp_path / "one")
    assert len(expected) == 5
    for name in ("rounds", "two"):
        assert losses(tmp_path / name) == pytest.approx(expected, rel=rounding)
        assert losses(tmp_path / name)[0] == pytest.approx(expected[0], rel=1e-6)
    # A run continues exactly under another number of processes.
    more = [*args[:-2], "--duration=0.00008", "--device=cpu", "--name=two", "--resume=auto"]
    run(*more)
    args[-2] = "--duration=0.00008"
    run(*args, "--name=whole")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "whole"), rel=of_ten_steps)


@pytest.mark.slow
def test_world_size_changes_stable_targets_by_rounding_only(dataset_zip, tmp_path):
    args = ["train.py", f"--outdir={tmp_path}", f"--data={dataset_zip}", "--cond=1", "--pfgmpp=1",
            "--tick=0.008", *TINY_RUN, "--dropout=0", "--duration=0.00004", "--device=cpu",
            "--stf=1", "--rbatch=20", "--augment=0"]
    run_script(*args, "--name=one")
    run_script(*args, "--name=two", "--batch-gpu=2", processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("flags", [
    ["--precond=ve", "--pfgmpp=1", "--aug_dim=0.7"],
    ["--precond=vp", "--pfgmpp=1", "--aug_dim=inf"],
    ["--precond=vp"],
    ["--arch=adm", "--cbase=32", "--augment=0", "--xflip=1", "--precision=bf16"],
    ["--fp16=1", "--cache=0", "--augment=0"],
    ["--deterministic", "--ls=3", "--nosubdir"],
    ["--stf=1", "--rbatch=30", "--augment=0"],
    ["--stf=1", "--rbatch=30", "--augment=0", "--precond=ve", "--pfgmpp=1", "--aug_dim=0.7"],
    ["--stf=1", "--rbatch=8", "--augment=0", "--precond=vp", "--lsun=0"],
    ["--stf=1", "--rbatch=30", "--augment=0", "--cond=1", "--label-dropout=0.1"],
    ["--lsun=1"],
])
def test_other_settings_train_and_their_snapshot_loads(flags, dataset_zip, tmp_path, invoke):
    from checkpoints.checkpoint import build_ema
    result = invoke(train.main, f"--outdir={tmp_path}", f"--data={dataset_zip}", *TINY_RUN,
                    "--duration=0.000024", *flags)
    torch.use_deterministic_algorithms(False)
    assert result.exit_code == 0, result.output
    [path] = tmp_path.rglob("network-snapshot-000000.pt")
    net = build_ema(load(path))
    if "--lsun=1" in flags:
        assert load(path)["options"]["lsun"]
    finite = "--pfgmpp=1" in flags and "--aug_dim=inf" not in flags
    expected = 0.7 if finite else math.inf
    assert expected == net.D
    assert all(math.isfinite(value) for value in losses(path.parent))


def test_numbered_run_directories_name_the_run(dataset_zip, tmp_path, invoke):
    for _ in range(2):
        assert invoke(train.main, f"--outdir={tmp_path}", f"--data={dataset_zip}", *TINY_RUN,
                      "--duration=0.000008", "--desc=try").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"0000{k}-tiny-uncond-ncsnpp-edm-gpus1-batch8-fp32-try" for k in (0, 1)]


@pytest.mark.long
def test_transfer_starts_from_the_weights_without_ema_rampup(undisturbed, dataset_zip, tmp_path,
                                                             invoke):
    run_dir, args = undisturbed
    source = run_dir / "network-snapshot-000000.080.pt"
    args = [a for a in args if not a.startswith(("--outdir", "--duration", "--seed"))]
    result = invoke(train.main, *args, f"--outdir={tmp_path}", "--duration=0.000008", "--seed=4",
                    f"--transfer={source}")
    assert result.exit_code == 0, result.output
    # The first step has learning rate 0, so the weights are still those transferred.
    after = load(tmp_path / "run" / "training-state-000000.008.pt")
    assert digest(after["net"]) == digest(load(source)["ema"])
    assert after["progress"]["ema_rampup"] is None
    result = invoke(train.main, *args, f"--outdir={tmp_path}", "--duration=0.000016",
                    "--resume=auto")
    assert result.exit_code == 0, result.output
    resumed = load(tmp_path / "run" / "training-state-000000.016.pt")
    assert resumed["progress"]["ema_rampup"] is None, "a resumed transfer stays one"


@pytest.mark.long
def test_dry_run_writes_nothing(dataset_zip, tmp_path, invoke):
    result = invoke(train.main, f"--outdir={tmp_path / 'new'}", f"--data={dataset_zip}", "-n",
                    *TINY_NETWORK)
    assert result.exit_code == 0 and '"batch": 512' in result.output
    assert not (tmp_path / "new").exists()
    # Only what decides something is printed.
    for name, flags in (("aug_dim", ["--pfgmpp=1"]), ("rbatch", ["--stf=1", "--augment=0"]),
                        ("patches", ["--patch=8"]), ("lr_decay_start", ["--lr-decay=cosine"])):
        assert f'"{name}"' not in result.output
        more = invoke(train.main, f"--outdir={tmp_path / 'new'}", f"--data={dataset_zip}", "-n",
                      *TINY_NETWORK, *flags)
        assert f'"{name}"' in more.output, more.output


@pytest.mark.long
def test_a_dimension_without_pfgmpp_is_warned_of_and_the_dry_run_names_the_noise(
        dataset_zip, tmp_path, invoke):
    args = [f"--outdir={tmp_path / 'new'}", f"--data={dataset_zip}", "-n", *TINY_NETWORK]
    result = invoke(train.main, *args, "--aug_dim=64")
    assert "Warning: --aug_dim=64 has no effect without --pfgmpp=1" in result.stderr
    assert "Noise      Gaussian (D = inf)\n" in result.stdout
    for flags in (["--pfgmpp=1", "--aug_dim=64"], ["--aug_dim=inf"], []):
        assert invoke(train.main, *args, *flags).stderr == ""


@pytest.mark.long
def test_dry_run_packs_nothing(dataset_zip, tmp_path, invoke, monkeypatch):
    monkeypatch.setenv("PFGMPP_CACHE_DIR", str(tmp_path / "cache"))
    invoke(train.main, f"--outdir={tmp_path / 'new'}", f"--data={dataset_zip}", "-n", *TINY_RUN)
    assert not (tmp_path / "cache").exists()


def one_line_error(result, code, *words):
    assert result.exit_code == code, result.output
    [line] = [text for text in result.output.splitlines() if text.startswith("Error: ")]
    for word in words:
        assert str(word) in line, line
    assert "Traceback" not in result.output


@pytest.mark.parametrize("flags, code, words", [
    (["--data=nowhere"], 1, ["nowhere"]),
    (["--aug_dim=0", "--pfgmpp=1"], 2, ["--aug_dim=0", "positive", "leave out --pfgmpp"]),
    (["--aug_dim=-3", "--pfgmpp=1"], 2, ["--aug_dim=-3"]),
    (["--aug_dim=nan", "--pfgmpp=1"], 2, ["--aug_dim=nan"]),
    (["--batch-gpu=3"], 2, ["--batch-gpu=3", "nearest: 2 or 4"]),
    (["--precond=iddpm"], 2, ["iddpm"]),
    (["--resume=nowhere.pt"], 1, ["nowhere.pt"]),
    (["--resume=auto"], 2, ["--name"]),
    (["--cres=1,2,2,2,2,2"], 1, ["can't be halved", "32"]),
    (["--cbase=33", "--cres=4,4"], 1, ["channels"]),
    (["--fp16=1", "--precision=bf16"], 2, ["choose one"]),
    (["--transfer=nowhere.pt"], 1, ["nowhere.pt"]),
    (["--lr=0"], 2, ["--lr=0"]),
    (["--stf=1", "--rbatch=7"], 2, ["--rbatch=7", "--batch=8"]),
    (["--stf=1", "--rbatch=8"], 2, ["--stf=1 with --augment=0.12", "used with --augment=0"]),
    (["--lsun=1", "--precond=vp"], 2, ["--lsun=1", "edm"]),
    (["--P_mean=-0.4", "--precond=vp"], 2, ["--P_mean=-0.4 with --precond=vp", "edm"]),
    (["--P_std=1", "--precond=ve"], 2, ["--P_std=1 with --precond=ve", "edm"]),
    (["--P_mean=inf"], 2, ["--P_mean=inf", "finite"]),
    (["--P_std=0"], 2, ["--P_std=0", "positive"]),
    (["--ares=8,3"], 1, ["--ares=8,3", "of 3; choose from 8, 4, or none"]),
    (["--ares=no"], 2, ["'no' is not a list"]),
    (["--clip-grad=0"], 2, ["--clip-grad=0", "positive"]),
    (["--lr-decay=rsqrt", "--lr-decay-start=0"], 2, ["--lr-decay-start=0 with", "positive"]),
    (["--lr-decay=rsqrt", "--lr-rampup=0"], 2, ["--lr-decay-start=0 (the end of --lr-rampup)"]),
    (["--lr-decay=cosine", "--lr-decay-start=9", "--duration=5"], 2,
     ["--lr-decay-start=9", "less than --duration=5"]),
    (["--lr-decay=rsqrt", "--lr-decay-start=-1"], 2, ["--lr-decay-start=-1", "0 or more"]),
    (["--device=cuda"], 1, ["--device=cpu"]),
])
def test_bad_options_get_one_line(flags, code, words, dataset_zip, tmp_path, invoke):
    if "--device=cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = invoke(train.main, f"--outdir={tmp_path / 'out'}", f"--data={dataset_zip}", *TINY_RUN,
                    *flags)
    one_line_error(result, code, *words)


def test_conditions_without_labels_get_one_line(tmp_path, invoke):
    data = write_dataset(tmp_path / "plain.zip", classes=0)
    result = invoke(train.main, f"--outdir={tmp_path / 'out'}", f"--data={data}", "--cond=1",
                    *TINY_RUN)
    one_line_error(result, 2, "no labels", "--cond=0")
    assert not (tmp_path / "out").exists()


def test_stable_targets_of_label_vectors_get_one_line(tmp_path, invoke):
    data = write_dataset(tmp_path / "vectors.zip", vectors=True)
    result = invoke(train.main, f"--outdir={tmp_path / 'out'}", f"--data={data}", "--cond=1",
                    "--stf=1", "--rbatch=8", "--augment=0", *TINY_RUN)
    one_line_error(result, 2, "--stf=1", "vectors.zip", "--cond=0")
    assert not (tmp_path / "out").exists()


def test_an_outdir_that_is_a_file_gets_one_line(dataset_zip, tmp_path, invoke):
    (tmp_path / "file").write_text("")
    result = invoke(train.main, f"--outdir={tmp_path / 'file'}", f"--data={dataset_zip}", *TINY_RUN)
    one_line_error(result, 1, "is a file")
    for place in (["--name=file"], ["--name=file/below"]):
        result = invoke(train.main, f"--outdir={tmp_path}", "--data=nowhere.zip", *TINY_RUN, *place)
        one_line_error(result, 1, f"{tmp_path / 'file'} is a file; name a folder")


@pytest.mark.long
def test_resuming_something_else_gets_one_line(undisturbed, dataset_zip, tmp_path, invoke):
    run_dir, _ = undisturbed
    common = [f"--outdir={tmp_path}", f"--data={dataset_zip}", "--cond=1", "--pfgmpp=1",
              *(flag for flag in TINY_RUN if not flag.startswith("--seed"))]
    state = run_dir / "training-state-000000.080.pt"
    snapshot = run_dir / "network-snapshot-000000.080.pt"
    one_line_error(invoke(train.main, *common, f"--resume={snapshot}"), 2, "--transfer")
    one_line_error(invoke(train.main, *common, f"--resume={dataset_zip}"), 1, "not a training")
    one_line_error(invoke(train.main, *common, f"--resume={state}", "--aug_dim=64"), 1,
                   "D: 64.0 here, 128.0 there")
    one_line_error(invoke(train.main, *common, f"--resume={state}", "--seed=9"), 1, "--seed=9")
    one_line_error(invoke(train.main, *common, f"--resume={state}", "--xflip=1"), 2, "--xflip")
    other = write_dataset(tmp_path / "other.zip", num=44)
    one_line_error(invoke(train.main, *common, f"--resume={state}", f"--data={other}"), 2,
                   "40 images then, 44 now", "--override-options")
    torn = tmp_path / "training-state-000000.pt"
    torn.write_bytes(state.read_bytes()[:-1000])
    one_line_error(invoke(train.main, *common, f"--resume={torn}"), 1, torn.name, "damaged")


@pytest.mark.long
def test_auto_resume_goes_by_the_images_in_the_file(undisturbed, tmp_path, invoke):
    run_dir, args = undisturbed
    older, _, newest = states(run_dir)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "training-state-000000.pt").write_bytes(newest.read_bytes())
    (tmp_path / "run" / older.name).write_bytes(older.read_bytes())
    args = [a for a in args if not a.startswith("--outdir")]
    result = invoke(train.main, *args, f"--outdir={tmp_path}", "--resume=auto")
    assert "Resuming from" in result.output and "training-state-000000.pt" in result.output
    assert "Nothing to do" in result.output


@pytest.mark.long
def test_a_run_on_label_vectors_trains_and_draws_its_grids(tmp_path, invoke):
    data = write_dataset(tmp_path / "vectors.zip", vectors=True)
    result = invoke(train.main, f"--outdir={tmp_path}", f"--data={data}", "--cond=1", *TINY_RUN,
                    "--samples=4", "--duration=0.000008", "--name=run")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "samples-000000.png").exists()


def test_a_diverged_run_says_so_on_the_console_and_in_its_log(dataset_zip, tmp_path, invoke):
    result = invoke(train.main, f"--outdir={tmp_path}", f"--data={dataset_zip}", *TINY_RUN,
                    "--pfgmpp=1", "--aug_dim=0.001", "--max-bad-steps=2", "--duration=0.00004",
                    "--tick=0.008", "--name=run")
    one_line_error(result, 3, "steps in a row", "larger --aug_dim")
    assert "Error: " in (tmp_path / "run" / "log.txt").read_text()
    assert "Warning: noise of D = 0.001" in result.output


@pytest.mark.long
def test_256x256_networks_build_and_take_a_step_with_lsun_noise(tmp_path, invoke):
    data = write_dataset(tmp_path / "large.zip", num=2, side=256, classes=0)
    result = invoke(train.main, f"--outdir={tmp_path}", f"--data={data}", "--lsun=1", "--name=run",
                    "--arch=ddpmpp", "--cbase=8", "--cres=1,1,1,1,2", "--nblock=1", "--batch=2",
                    "--workers=0", "--samples=0", "--duration=0.000004", "--pfgmpp=1")
    assert result.exit_code == 0, result.output
    assert all(math.isfinite(value) for value in losses(tmp_path / "run"))
    with torch.device("meta"):
        net = build_network(TrainConfig(data="x", cres=(1, 1, 2, 2, 4, 4)).network(256, 3, 0))
    assert sum(p.numel() for p in net.parameters()) > 1e8


def test_a_finished_run_is_not_overwritten(undisturbed, invoke):
    run_dir, args = undisturbed
    one_line_error(invoke(train.main, *args), 1, "--resume=auto")
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()
              if path.is_file() and path.name != "log.txt"}
    shorter = [*args, "--resume=auto", "--duration=0.00004"]
    assert "Nothing to do: 80 of 40 images done" in invoke(train.main, *shorter).output
    assert before == {path.name: path.read_bytes() for path in run_dir.iterdir()
                      if path.is_file() and path.name != "log.txt"}


@pytest.mark.long
def test_auto_resume_passes_over_a_damaged_state(undisturbed, tmp_path, invoke):
    run_dir, args = undisturbed
    copy = tmp_path / "run"
    copy.mkdir()
    good, bad = states(run_dir)[1:]
    (copy / good.name).write_bytes(good.read_bytes())
    flipped = bytearray(bad.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (copy / bad.name).write_bytes(flipped)
    args = [a for a in args if not a.startswith("--outdir")]
    result = invoke(train.main, *args, f"--outdir={tmp_path}", "--resume=auto")
    assert result.exit_code == 0, result.output
    assert f"Warning: skipped {copy / bad.name}: damaged" in result.output
    assert digest(load(copy / bad.name)["net"]) == digest(load(bad)["net"])


@pytest.mark.parametrize("device, has_triton, options, expected", [
    ("cuda", True, {}, True), ("cuda", False, {}, False), ("cpu", True, {}, False),
    ("cuda", True, {"deterministic": True}, False), ("cuda", True, {"compile": "0"}, False),
    ("cpu", False, {"compile": "1"}, True),
])
def test_networks_are_compiled_by_themselves_on_gpus_alone(dataset_zip, monkeypatch, device,
                                                           has_triton, options, expected):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: has_triton)
    config = TrainConfig(data=str(dataset_zip), arch="ncsnpp", cbase=8, cres=(1, 2), nblock=1,
                         batch=8, **options)
    trainer = Trainer(config, ImageFolderDataset(dataset_zip), torch.device("cpu"))
    trainer.device = torch.device(device)
    assert trainer.is_compiled == expected


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--checkpoint-blocks=1"]], ids=str)
def test_a_compiled_network_trains_alike(dataset_zip, tmp_path, invoke, flags):
    for name in ("0", "1"):
        result = invoke(train.main, f"--outdir={tmp_path}", f"--data={dataset_zip}", *TINY_RUN,
                        "--duration=0.00004", "--dropout=0", f"--compile={name}", f"--name={name}",
                        *flags)
        assert result.exit_code == 0, result.output
        assert (", compiled" in result.output) == (name == "1")
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "0"), rel=1e-3)
