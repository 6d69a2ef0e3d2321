"""Runs on patches: the batches of every split, files, resuming, fine-tuning and refusals."""

import json
import math
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch
from scripts import run_script
from snapshots import write_snapshot
from tiny import TINY_NETWORK, TINY_RUN, write_dataset

import distill
import sweep
import train
from checkpoints import checkpoint
from checkpoints.checkpoint import digest, load
from images.dataset import ImageFolderDataset, order_at
from images.patches import patch_offsets
from pfgmpp.networks import build_network
from torch_utils import distributed
from training.config import TrainConfig
from training.estimate import Estimate
from training.resume import open_weights
from training.trainer import DivergedError, Trainer
from training.training_loop import training_loop
from training.validation import Validation, open_held_out

CPU = torch.device("cpu")
SIDE, NUM = 16, 10  # of the patches; of the data set, whose images are 24x20
# Like the networks of CT denoisers: attention on two levels, which --ares names.
ATTENDING = ["--arch=ddpmpp", "--cbase=8", "--cres=1,1,2,2", "--nblock=1", "--ares=4,2"]
RUN = [*ATTENDING, "--batch=8", "--lr=1e-2", "--lr-rampup=0", "--ema=0.00001", "--augment=0",
       "--workers=0", "--seed=3", "--samples=0", "--tick=0.008", "--dump=1", "--pfgmpp=1",
       "--aug_dim=64", "--cond-image=1", f"--patch={SIDE}", "--patches=3"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A ZIP of RGB images 24x20 of which no two pixels are alike, and their conditions."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.zip")


def write_pairs(path, size=(24, 20), num=NUM):
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(num):
            image = rng.integers(0, 256, [*size, 3], np.uint8)
            for folder, pixels in (("", image), ("cond/", 255 - image)):
                with archive.open(f"{folder}{i:02d}.png", "w") as file:
                    PIL.Image.fromarray(pixels).save(file, "PNG")
    return path


def call(invoke, main, *args, code=0):
    result = invoke(main, *args)
    assert result.exit_code == code, result.output
    if not code:
        return result.output
    [line] = [text for text in result.output.splitlines() if text.startswith("Error: ")]
    return line


def make_trainer(data, start=0, cache=False, **options):
    options = {"cbase": 8, "cres": (1, 2), "nblock": 1, "batch": 8, "workers": 0, "patch": SIDE,
               "patches": 3, "seed": 3, "cond_image": True, "augment": 0.0} | options
    config = TrainConfig(data=str(data), **options)
    dataset = ImageFolderDataset(data, use_conditions=config.cond_image, patch=config.patch,
                                 xflip=config.xflip, cache=cache)
    trainer = Trainer(config, dataset, CPU)
    trainer.cur_nimg = start
    trainer.start()
    return trainer


def steps_of(trainer, steps=3):
    """Returns the images and conditions that this rank trains on, [n, 2, C, H, W]."""
    batches = [torch.stack([batch.images, batch.condition], dim=1)
               for _ in range(steps) for batch in trainer._next_batches()]
    return torch.cat(batches).reshape(steps, -1, *batches[0].shape[1:])


def expected_steps(data, first=0, count=24, seed=3, patches=3, xflip=False):
    """Returns the same by the definition, from whole images."""
    whole = ImageFolderDataset(data, use_conditions=True, xflip=xflip)
    numbers = first + np.arange(count)
    found = []
    for index, (y, x) in zip(order_at(len(whole), seed, numbers // patches),
                             patch_offsets(seed, numbers, (24 - SIDE, 20 - SIDE)), strict=True):
        images, _, conditions = whole.get_batch([index])
        found.append([array[0, :, y:y + SIDE, x:x + SIDE] for array in (images, conditions)])
    return torch.from_numpy(np.stack(found)).float() / 127.5 - 1


# ---------------------------------------------------------------------------------- the batches


@pytest.mark.parametrize("options", [
    {}, {"batch_gpu": 2}, {"workers": 2}, {"workers": 1, "cache": True}, {"xflip": True},
    {"cache": True, "data_on_device": "1"}, {"cache": True, "data_on_device": "1", "xflip": True},
    {"patches": 1}, {"patches": 8}], ids=str)
def test_a_run_sees_the_patches_of_its_seed(pairs, options):
    found = steps_of(make_trainer(pairs, **options)).flatten(0, 1)
    expected = expected_steps(pairs, patches=options.get("patches", 3),
                              xflip=options.get("xflip", False))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[:, 0], -found[:, 1], rtol=0, atol=1e-6)


def test_ranks_and_rounds_share_the_patches_of_one_process(pairs, monkeypatch):
    whole = steps_of(make_trainer(pairs))
    parts = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
        parts.append(steps_of(make_trainer(pairs, batch_gpu=2)))
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_a_run_goes_on_in_the_middle_of_an_image(pairs):
    whole = steps_of(make_trainer(pairs), 4)
    assert 16 % 3  # after two steps the sixth image has one of its three patches
    assert torch.equal(steps_of(make_trainer(pairs, start=16), 2), whole[2:])


def test_a_patch_of_the_whole_image_changes_nothing(dataset_zip):
    weights = []
    for options in ({}, {"patch": 8}):
        trainer = make_trainer(dataset_zip, **{"patch": None, "patches": 1, "cond_image": False}
                               | options)
        trainer.train_step()
        weights.append(digest(dict(trainer.net.state_dict())))
    assert weights[0] == weights[1]


def test_a_run_that_diverges_names_the_images_of_its_patches(pairs):
    trainer = make_trainer(pairs, start=8, max_bad_steps=1)
    trainer.counters["worst_row"] += 2
    trainer.counters["bad_step"] += 2
    order = order_at(NUM, 3, np.arange(16, 24) // 3)
    with pytest.raises(DivergedError, match=f"data indices {', '.join(map(str, order))}\\)"):
        trainer.check_divergence()


def test_held_out_patches_depend_on_the_image_alone(pairs, monkeypatch):
    seen = []

    def loss(net, images, labels, *, draws, condition):
        seen.extend(torch.stack([images, condition], dim=1))
        return images

    for options in ({}, {"seed": 9, "batch": 4}, {"patches": 1, "workers": 1}):
        trainer = make_trainer(pairs, val_data=str(pairs), **options)
        validation = Validation(trainer, open_held_out(trainer.config, trainer.dataset))
        monkeypatch.setattr(type(trainer.loss_fn), "__call__", lambda self, *a, **k: loss(*a, **k))
        validation()
    found = torch.stack(seen).reshape(3, NUM, 2, 3, SIDE, SIDE)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    whole = ImageFolderDataset(pairs, use_conditions=True)
    offsets = patch_offsets(int.from_bytes(b"val", "big"), np.arange(NUM), (8, 4))
    for i, (y, x) in enumerate(offsets):
        images, _, conditions = whole.get_batch([i])
        for patch, array in zip(found[0, i], (images, conditions), strict=True):
            cut = torch.from_numpy(array[0, :, y:y + SIDE, x:x + SIDE]).float() / 127.5 - 1
            torch.testing.assert_close(patch, cut, rtol=0, atol=1e-6)
    assert len(np.unique(offsets, axis=0)) > 4


# ---------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def undisturbed(pairs, tmp_path_factory):
    """A run of five steps with --ares."""
    from click.testing import CliRunner
    folder = tmp_path_factory.mktemp("undisturbed")
    args = [f"--data={pairs}", *RUN, "--name=run"]
    result = CliRunner().invoke(train.main, [*args, f"--outdir={folder}", "--duration=0.00004",
                                             f"--val-data={pairs}"])
    assert result.exit_code == 0, result.output
    return folder / "run", args, result.output


@pytest.mark.long
def test_a_run_on_patches_with_attention_of_ones_own_resumes_to_the_byte(undisturbed, tmp_path,
                                                                         invoke):
    run_dir, args, _ = undisturbed
    for duration in ("0.000016", "0.00004"):
        call(invoke, train.main, *args, f"--outdir={tmp_path}", f"--duration={duration}",
             "--resume=auto")
    name = "training-state-000000.040.pt"
    whole, resumed = load(run_dir / name), load(tmp_path / "run" / name)
    for part in ("net", "ema", "optimizer", "progress"):
        assert digest(whole[part]) == digest(resumed[part]), part


@pytest.mark.long
def test_files_say_what_the_network_was_trained_on(undisturbed):
    run_dir, _, output = undisturbed
    content = load(run_dir / "network-snapshot-000000.040.pt")
    assert content["network"]["img_resolution"] == SIDE
    assert content["network"]["attn_resolutions"] == [4, 2]
    assert {name.split(".")[2] for name in content["ema"] if "qkv" in name} == {
        "4x4_block0", "4x4_block1", "2x2_block0", "2x2_block1", "2x2_in0"}
    for record in (content, json.loads((run_dir / "training_options.json").read_text())):
        assert record["dataset"]["patch"] == SIDE
        assert record["dataset"]["image_shape"] == [3, 24, 20]
        assert record["dataset"]["cond_shape"] == [3, 24, 20]
        assert record["options"]["patch"] == SIDE and record["options"]["patches"] == 3
    assert "10 images 3x24x20, in patches of 16x16 (3 per image)" in output
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert [line["Progress/kimg"]["mean"] for line in lines] == pytest.approx(
        [0.008, 0.016, 0.024, 0.032, 0.04])
    assert all(math.isfinite(line["Loss/val"]["mean"]) for line in lines)


@pytest.mark.long
@pytest.mark.parametrize("flags, words", [
    (["--patch=8", "--ares=4,2"], "--patch=8 (16 in the state)"),
    (["--patches=2"], "--patches=2 (3 in the state)"),
    (["--patch=8", "--ares=4,2", "--override-options"], "img_resolution: 8 here, 16 there")])
def test_another_patch_is_refused_on_resuming(undisturbed, tmp_path, invoke, flags, words):
    run_dir, args, _ = undisturbed
    line = call(invoke, train.main, *args, f"--outdir={tmp_path}", *flags,
                f"--resume={run_dir / 'training-state-000000.040.pt'}",
                code=1 if "--override-options" in flags else 2)
    assert words in line and "--patch" in line


@pytest.mark.long
def test_a_network_of_another_patch_goes_on_with_the_same_function(undisturbed, pairs, tmp_path,
                                                                   invoke):
    run_dir, args, _ = undisturbed
    source = run_dir / "network-snapshot-000000.040.pt"
    # The same levels attend: those of 16 pixels are called 4 and 2, those of 8 pixels 2 and 1.
    flags = [f"--transfer={source}", "--patch=8", "--ares=2,1", f"--outdir={tmp_path}"]
    output = call(invoke, train.main, *args, *flags, "--duration=0.000016")
    assert "100% of the network's parameters\n" in output
    config = TrainConfig(data="x", cbase=8, cres=(1, 1, 2, 2), nblock=1, ares=(2, 1), pfgmpp=True,
                         aug_dim=64.0, augment=0.0)
    small = build_network(config.network(8, 3, 0, 3)).eval()
    small.load_state_dict(open_weights(str(source), small).tensors)
    large = checkpoint.build_ema(load(source))
    x, condition = torch.randn([2, 2, 3, 24, 32], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(small(x, 0.7, condition=condition), large(x, 0.7, condition=condition))


@pytest.mark.long
def test_pictures_and_scores_are_of_patches_from_the_middle(pairs, tmp_path, invoke):
    middle = tmp_path / "middle.zip"
    whole = ImageFolderDataset(pairs, use_conditions=True)
    images, _, conditions = whole.get_batch(range(NUM))
    cut = np.s_[:, :, 4:20, 2:18]
    with zipfile.ZipFile(middle, "w") as archive:
        for i in range(NUM):
            with archive.open(f"{i:02d}.png", "w") as file:
                PIL.Image.fromarray(images[cut][i].transpose(1, 2, 0)).save(file, "PNG")
    flags = ["--eval=0.008", "--eval-num=3", "--eval-detector=pixels", "--duration=0.000008",
             f"--outdir={tmp_path}", f"--data={pairs}", *RUN, "--samples=4", "--eval-steps=2"]
    call(invoke, train.main, *flags, f"--eval-ref={middle}", "--name=run")
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text())["value"] > 0
    grid = np.asarray(PIL.Image.open(tmp_path / "run/samples-000000.008.png"))
    columns = (grid.shape[1] - 2) // 66  # 16 pixels enlarged to 64, gaps of 2
    for row in range(2):
        for column, expected in ((0, conditions), (columns - 1, images)):
            y, x = 2 + 66 * row, 2 + 66 * column
            shown = grid[y:y + 64:4, x:x + 64:4].transpose(2, 0, 1)
            assert np.array_equal(shown, expected[cut][row])
    reals = np.asarray(PIL.Image.open(tmp_path / "run/reals.png"))
    first = reals[2:66:4, 2:66:4].transpose(2, 0, 1)
    assert (images[cut] == first).all((1, 2, 3)).any()
    line = call(invoke, train.main, *flags, f"--eval-ref={pairs}", "--name=other", code=1)
    assert "its images are 20x24" in line and "(--patch=16) are 16x16" in line


def test_sigma_data_is_measured_on_whole_images(pairs):
    whole, patches = (ImageFolderDataset(pairs, patch=patch).measure()[0] for patch in (None, 4))
    assert whole.std.tolist() == patches.std.tolist() and whole.count == patches.count


@pytest.mark.slow
@pytest.mark.scripts
def test_two_processes_train_what_one_does(pairs, tmp_path, invoke):
    args = [f"--data={pairs}", *RUN, "--dropout=0", "--duration=0.000024", "--device=cpu",
            f"--outdir={tmp_path}"]
    call(invoke, train.main, *args, "--name=one")
    run_script("train.py", *args, "--name=two", "--batch-gpu=2", "--workers=1", processes=2)
    losses = [[json.loads(line)["Loss/loss"]["mean"]
               for line in (tmp_path / name / "stats.jsonl").read_text().splitlines()]
              for name in ("one", "two")]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.long
def test_few_step_networks_are_made_on_patches_of_the_teachers_size(tmp_path, invoke):
    data = write_dataset(tmp_path / "data.zip", side=12, classes=0)
    teacher = write_snapshot(tmp_path / "teacher.pt", label_dim=0, augment=0.0)
    args = [f"--teacher={teacher}", f"--data={data}", f"--outdir={tmp_path}", "--batch=8",
            "--duration=0.000016", "--tick=0.008", "--workers=0", "--samples=0", "--name=run"]
    assert "images are 3x12x12" in (line := call(invoke, distill.main, *args, code=1))
    assert "or give --patch=8" in line
    line = call(invoke, distill.main, *args, "--patch=4", code=1)
    assert "patches are 3x4x4" in line and "or give --patch=8" in line
    call(invoke, distill.main, *args, "--patch=8", "--patches=2")
    content = load(tmp_path / "run/network-snapshot-000000.016.pt")
    assert content["dataset"]["patch"] == 8 and content["network"]["img_resolution"] == 8


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("flags, code, words", [
    (["--patch=24", "--ares=none"], 1, ["images are 20x24", "24x24", "give --patch=20 or less"]),
    (["--patch=18"], 1, ["--patch=18: ", "can't be halved 3 times", "16 or 24"]),
    (["--patch=8"], 1, ["--patch=8: ", "--ares=4,2,1,16", "of 16; choose from 8, 4, 2, 1"]),
    (["--patch=0"], 2, ["--patch=0: must be 1 or more"]),
    (["--patch=x"], 2, ["--patch"]),
    (["--patches=0"], 2, ["--patches=0: must be 1 or more"]),
    (["--stf=1", "--rbatch=8", "--cond-image=0"], 2, ["--stf=1 with --patch=16"]),
    (["--val-data=SMALL"], 1, ["small.zip: images are 12x12", "give --patch=12 or less"]),
], ids=str)
def test_patches_that_cannot_be_get_one_line(pairs, tmp_path, invoke, flags, code, words):
    small = write_pairs(tmp_path / "small.zip", (12, 12), 2)
    args = [flag.replace("SMALL", str(small)) for flag in [*RUN, *flags]]
    if "--patch=8" in flags:
        args.append("--ares=4,2,1,16")
    line = call(invoke, train.main, f"--data={pairs}", f"--outdir={tmp_path / 'out'}", *args,
                code=code)
    assert all(word in line for word in words), line
    assert not list(tmp_path.rglob("training_options.json"))


def test_a_number_of_patches_needs_their_side(dataset_zip, tmp_path, invoke):
    line = call(invoke, train.main, f"--data={dataset_zip}", f"--outdir={tmp_path}", *TINY_RUN,
                "--patches=2", code=2)
    assert line == "Error: --patches=2: must be used with --patch, the side of a patch"


@pytest.mark.long
def test_a_dry_run_counts_the_network_of_a_patch(pairs, tmp_path, invoke):
    output = call(invoke, train.main, f"--data={pairs}", f"--outdir={tmp_path / 'out'}", *RUN, "-n")
    assert "10 images 3x24x20, in patches of 16x16 (3 per image), 0 label" in output
    options, _ = json.JSONDecoder().raw_decode(output)
    assert options["patch"] == SIDE and options["patches"] == 3
    network = TrainConfig.from_dict(options).network(SIDE, 3, 0, 3)
    [line] = [line for line in output.splitlines() if line.startswith("Operations")]
    flops = Estimate.of_network(network).forward_flops
    assert line.split()[1] == f"{flops / 1e6:.4g}"


def test_a_study_of_patches_needs_a_reference_of_patches(tmp_path, invoke):
    data = write_dataset(tmp_path / "data.zip", side=12, num=8)
    small = write_dataset(tmp_path / "small.zip", num=8)
    args = [f"--data={data}", "--aug_dims=2", f"--outdir={tmp_path / 'out'}", "-n", "--seeds=0-3",
            "--detector=pixels"]
    words = ["--", *TINY_NETWORK, "--patch=8"]
    line = call(invoke, sweep.main, *args, *words, code=1)
    assert "(--patch=8) are 8x8" in line
    assert "--patch=8" in call(invoke, sweep.main, *args, f"--ref={small}", *words)


def test_a_run_in_python_takes_patches_too(pairs, tmp_path):
    config = TrainConfig(data=str(pairs), cbase=8, cres=(1, 2), nblock=1, batch=4, workers=0,
                         duration=4e-6, patch=8, samples=1)
    training_loop(config, dataset=ImageFolderDataset(pairs, patch=8), run_dir=tmp_path, device=CPU)
    [path] = tmp_path.glob("network-snapshot-*.pt")
    assert checkpoint.build_ema(load(path)).image_shape == (3, 8, 8)
