"""The held-out loss: its value, its draws, what it is computed in, and data that do not fit."""

import dataclasses
import json
import math

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import TINY_RUN, write_dataset

import train
from checkpoints.checkpoint import build_ema, digest, load
from images.dataset import ImageFolderDataset
from torch_utils import distributed
from torch_utils.misc import configure_backends, mix_seed
from training import training_loop, validation
from training.config import TrainConfig
from training.objectives import build_loss
from training.trainer import Trainer
from training.validation import CHUNK, Validation, open_held_out

CPU = torch.device("cpu")
NUM = CHUNK + 10  # held-out images: two chunks, the second one short


@pytest.fixture(scope="module")
def held_out_zip(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("held-out") / "val.zip", num=NUM)


def make_trainer(data, val, **options):
    options = {"arch": "ncsnpp", "cbase": 8, "cres": (1, 2), "nblock": 1, "batch": 8, "workers": 0,
               "val_data": str(val)} | options
    config = TrainConfig(data=str(data), **options)
    return Trainer(config, ImageFolderDataset(data, use_labels=config.cond), CPU)


def with_noise(trainer):
    """Gives a trainer's average weights that differ from those of its network, and no zeros."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainer.ema.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * 0.05)
    return trainer


def held_out_loss(trainer, **options):
    config = dataclasses.replace(trainer.config, **options)
    validation = Validation(trainer, open_held_out(config, trainer.dataset))
    with trainer.average_in_fp32():
        return validation()


def expected_loss(net, config, data, chunk=CHUNK):
    """The loss by its definition, in one batch for each chunk."""
    squares = []
    for k, first in enumerate(range(0, len(data), chunk)):
        pixels, labels, *_ = data.get_batch(range(first, min(first + chunk, len(data))))
        rng = torch.Generator().manual_seed(mix_seed(int.from_bytes(b"val", "big"), k))
        draws = build_loss(config, net).draw((chunk, *pixels.shape[1:]), rng)[:len(pixels)]
        y, sigma = torch.from_numpy(pixels).double() / 127.5 - 1, draws.sigma.double()
        factors = (sigma * draws.scale).reshape(-1, 1, 1, 1)
        noisy = (y + factors * draws.z.double()).float()
        with torch.no_grad():
            denoised = net(noisy, draws.sigma, torch.from_numpy(labels)).double()
        weight = ((sigma**2 + 0.25) / (sigma * 0.5)**2).reshape(-1, 1, 1, 1)
        squares.append(weight * (denoised - y).square())
    return torch.cat(squares).mean().item()


@pytest.mark.long
@pytest.mark.parametrize("options", [
    {}, {"cond": True, "label_dropout": 0.9}, {"pfgmpp": True, "aug_dim": 3.0},
    {"augment": 0.5, "dropout": 0.5}, {"precision": "bf16"},
    {"stf": True, "rbatch": 16, "augment": 0.0}],
    ids=lambda options: ",".join(options) or "plain")
def test_the_held_out_loss_is_that_of_the_average_without_disturbance(dataset_zip, held_out_zip,
                                                                      options):
    trainer = with_noise(make_trainer(dataset_zip, held_out_zip, **options))
    data = open_held_out(trainer.config, trainer.dataset)
    assert len(data) == NUM
    trainer.ema.compute_dtype = torch.float32
    expected = expected_loss(trainer.ema, trainer.config, data)
    found = held_out_loss(trainer)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != pytest.approx(expected_loss(trainer.net, trainer.config, data), rel=1e-4)
    assert held_out_loss(trainer) == found


@pytest.mark.parametrize("D", [1, 2, 128, math.inf])
def test_the_held_out_loss_of_known_denoisers_is_known(dataset_zip, held_out_zip, D):
    trainer = make_trainer(dataset_zip, held_out_zip, pfgmpp=not math.isinf(D), aug_dim=D)
    data = open_held_out(trainer.config, trainer.dataset)
    y = torch.from_numpy(data.get_batch(range(NUM))[0]).double() / 127.5 - 1

    class Gray(torch.nn.Module):
        def forward(self, x, sigma, labels=None, augment_labels=None):
            return torch.zeros_like(x)

    trainer.ema = Gray()
    sigma = torch.cat([trainer.loss_fn.sample_sigma(
        CHUNK, torch.Generator().manual_seed(mix_seed(int.from_bytes(b"val", "big"), chunk)))
        for chunk in range(2)])[:NUM].double()
    weight = (sigma**2 + 0.25) / (sigma * 0.5)**2
    expected = (weight * y.square().mean(dim=(1, 2, 3))).mean().item()
    assert held_out_loss(trainer) == pytest.approx(expected, rel=1e-6)


def as_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr(distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(distributed, "get_world_size", lambda: world_size)


@pytest.mark.long
def test_the_held_out_loss_does_not_depend_on_the_split(dataset_zip, held_out_zip, monkeypatch):
    whole = held_out_loss(with_noise(make_trainer(dataset_zip, held_out_zip, cond=True)))
    for options in ({"batch_gpu": 1}, {"batch": 96, "batch_gpu": 48}, {"batch": 256},
                    {"batch": 12, "workers": 2, "seed": 5}):
        trainer = make_trainer(dataset_zip, held_out_zip, cond=True, **options)
        trainer.ema = with_noise(make_trainer(dataset_zip, held_out_zip, cond=True)).ema
        assert held_out_loss(trainer) == pytest.approx(whole, rel=1e-6), options
    sums = []
    monkeypatch.setattr(distributed, "all_reduce_sum_", lambda x: sums.append(x.clone()) or x)
    for rank in range(3):  # of which the last has nothing to do
        as_rank(monkeypatch, rank, 3)
        trainer = with_noise(make_trainer(dataset_zip, held_out_zip, cond=True, batch=12))
        if rank < 2:
            held_out_loss(trainer)
        else:
            with pytest.raises(ZeroDivisionError):  # nothing is added up here
                held_out_loss(trainer)
    total, count = sum(sums).tolist()
    assert count == NUM * 3 * 8 * 8 and total / count == pytest.approx(whole, rel=1e-6)


def test_the_held_out_images_are_a_choice_from_all_of_them(dataset_zip, held_out_zip):
    trainer = make_trainer(dataset_zip, held_out_zip)
    few = open_held_out(dataclasses.replace(trainer.config, val_num=12), trainer.dataset)
    chosen = [few.get_details(i).raw_idx for i in range(len(few))]
    assert len(chosen) == 12 and chosen != list(range(12))
    other_seed = dataclasses.replace(trainer.config, val_num=12, seed=8)
    again = open_held_out(other_seed, trainer.dataset)
    assert [again.get_details(i).raw_idx for i in range(12)] == chosen


def test_classes_that_are_not_held_out_may_be_missing(dataset_zip, tmp_path):
    one_class = write_dataset(tmp_path / "one.zip", num=12, classes=1)
    trainer = with_noise(make_trainer(dataset_zip, one_class, cond=True))
    data = open_held_out(trainer.config, trainer.dataset)
    assert data.label_dim == 1 and trainer.net.label_dim == 2
    two = ImageFolderDataset(one_class, use_labels=True)
    two.labels_of = lambda rows: np.float32([[1, 0]] * len(rows))
    assert held_out_loss(trainer) == pytest.approx(
        expected_loss(trainer.ema, trainer.config, two), rel=1e-5)


def test_the_average_computes_in_float32_for_a_while(dataset_zip, held_out_zip):
    for precision, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32)):
        trainer = make_trainer(dataset_zip, held_out_zip, precision=precision, bench=False)
        configure_backends(precision, benchmark=False)
        state = torch.backends.cuda.matmul, torch.backends.cudnn
        try:
            with trainer.average_in_fp32():
                assert trainer.ema.compute_dtype == torch.float32
                assert not any(backend.allow_tf32 for backend in state)
                assert not torch.backends.cudnn.benchmark
            assert trainer.ema.compute_dtype == dtype and trainer.net.compute_dtype == dtype
            assert all(backend.allow_tf32 == (precision == "tf32") for backend in state)
        finally:
            configure_backends("fp32", benchmark=False)


# ------------------------------------------------------------------------------------------- runs


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(invoke, data, folder, *flags):
    result = invoke(train.main, f"--outdir={folder}", f"--data={data}", *TINY_RUN, "--name=a",
                    "--duration=0.000032", "--tick=0.008", "--snap=1", "--dump=1", *flags)
    assert result.exit_code == 0, result.output
    return result.output, folder / "a"


@pytest.mark.long
@pytest.mark.parametrize("flags", [
    ["--workers=1", "--cache=0"], pytest.param([], marks=pytest.mark.slow),
    pytest.param(["--precision=tf32"], marks=pytest.mark.slow)], ids=str)
def test_a_run_reports_the_held_out_loss_of_its_snapshots(dataset_zip, held_out_zip, tmp_path,
                                                          invoke, monkeypatch, flags):
    seen, evaluated = [], Validation.__call__

    def noted(self):
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return evaluated(self)

    monkeypatch.setattr(Validation, "__call__", noted)
    output, folder = run(invoke, dataset_zip, tmp_path, "--cond=1", "--val-num=70", *flags,
                         f"--val-data={held_out_zip}")
    configure_backends("fp32", benchmark=False)
    assert seen == [False] * 4
    lines = lines_of(folder / "stats.jsonl")
    losses = {line["Progress/kimg"]["mean"]: line["Loss/val"] for line in lines}
    assert list(losses) == pytest.approx([0.008, 0.016, 0.024, 0.032])
    record = json.loads((folder / "training_options.json").read_text())
    config = TrainConfig.from_dict(record["options"])
    assert record["held_out"]["size"] == 70
    data = open_held_out(config, ImageFolderDataset(dataset_zip, use_labels=True))
    for kimg, loss in losses.items():
        content = load(folder / f"network-snapshot-{kimg:010.3f}.pt")
        expected = expected_loss(build_ema(content), config, data)
        assert loss == {"num": 1, "mean": pytest.approx(expected, rel=1e-5), "std": 0}
        assert f" val {loss['mean']:.5f} " in output


@pytest.mark.long
def test_features_of_a_reference_are_computed_in_float32(dataset_zip, tmp_path, invoke,
                                                         monkeypatch):
    seen, opened = [], training_loop.open_evaluator

    def noted(*args, **kwargs):
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return opened(*args, **kwargs)

    monkeypatch.setattr(training_loop, "open_evaluator", noted)
    result = invoke(train.main, f"--outdir={tmp_path}", f"--data={dataset_zip}", *TINY_RUN,
                    "--duration=0.000008", "--precision=tf32", "--eval=1", "--eval-num=2",
                    f"--eval-ref={dataset_zip}", "--eval-detector=pixels")
    configure_backends("fp32", benchmark=False)
    assert result.exit_code == 0 and seen == [False]


@pytest.mark.long
def test_training_does_not_see_held_out_images(dataset_zip, held_out_zip, tmp_path, invoke):
    digests = []
    for name, flags in (("without", []), ("with", [f"--val-data={held_out_zip}"])):
        _, folder = run(invoke, dataset_zip, tmp_path / name, *flags, "--pfgmpp=1")
        state = load(folder / "training-state-000000.032.pt")
        digests.append([digest(state[key]) for key in ("net", "ema", "optimizer")])
    assert digests[0] == digests[1]


@pytest.mark.long
def test_a_resumed_run_may_change_its_held_out_images(dataset_zip, held_out_zip, tmp_path, invoke):
    run(invoke, dataset_zip, tmp_path, f"--val-data={held_out_zip}")
    output, folder = run(invoke, dataset_zip, tmp_path, "--duration=0.00004", "--resume=auto",
                         f"--val-data={dataset_zip}", "--val-num=20")
    assert "Loss/val" in lines_of(folder / "stats.jsonl")[-1]


def test_an_error_in_the_held_out_loss_leaves_the_precision_of_the_run(
        dataset_zip, held_out_zip, tmp_path, invoke, monkeypatch):
    trainers = []

    class Stopping(Validation):
        def __init__(self, trainer, data):
            trainers.append(trainer)

        def __call__(self):
            assert trainers[0].ema.compute_dtype == torch.float32
            raise ValueError("stop")

    monkeypatch.setattr(training_loop, "Validation", Stopping)
    result = invoke(train.main, f"--outdir={tmp_path}", f"--data={dataset_zip}", *TINY_RUN,
                    "--precision=bf16", "--duration=0.000008", f"--val-data={held_out_zip}")
    assert result.exit_code == 1 and "Error: stop" in result.output
    assert trainers[0].ema.compute_dtype == torch.bfloat16


# ---------------------------------------------------------------------------- data that do not fit


def write_arrays(folder, scale=None, conditions=True, channels=2):
    for name in ("x", "cond/x") if conditions else ("x",):
        for i in range(4):
            file = folder / f"{name}{i}.npy"
            file.parent.mkdir(exist_ok=True, parents=True)
            np.save(file, np.random.default_rng(i).normal(size=[channels, 8, 8]).astype("float32"))
    record = {} if scale is None else {"scale": {"center": [0.0], "spread": [scale]}}
    (folder / "dataset.json").write_text(json.dumps(record))
    return folder


def write_val(kind, folder):
    if kind == "size":
        return write_dataset(folder / "val.zip", side=16)
    if kind == "gray":
        return write_dataset(folder / "val.zip", channels=1)
    if kind in ("none", "more", "vectors"):
        return write_dataset(folder / "val.zip", classes={"none": 0, "more": 3, "vectors": 2}[kind],
                             vectors=kind == "vectors")
    if kind == "mixed":
        path = folder / "val"
        path.mkdir()
        for i, size in enumerate((8, 9)):
            PIL.Image.new("RGB", (size, size)).save(path / f"{i}.png")
        return path
    return folder / "nowhere.zip"


@pytest.mark.parametrize("kind, flags, words", [
    ("nowhere", [], ["nowhere.zip"]),
    ("size", [], ["--val-data=", "its images are 3x16x16", "training data are 3x8x8"]),
    ("gray", [], ["its images are 1x8x8"]),
    ("mixed", ["--cache=0"], ["1.png", "RGB 9x9"]),
    ("none", ["--cond=1"], ["has no labels", "--cond=0"]),
    ("more", ["--cond=1"], ["are 3 classes, but those of the training data are 2 classes"]),
    ("vectors", ["--cond=1"], ["its labels are 3 numbers each", "2 classes"]),
])
def test_held_out_data_that_do_not_fit_are_one_line_before_the_run(dataset_zip, tmp_path, invoke,
                                                                   kind, flags, words):
    val = write_val(kind, tmp_path)
    result = invoke(train.main, f"--outdir={tmp_path / 'out'}", f"--data={dataset_zip}", *TINY_RUN,
                    f"--val-data={val}", *flags)
    assert result.exit_code == 1, result.output
    [line] = [text for text in result.output.splitlines() if text.startswith("Error: ")]
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists() and "Traceback" not in result.output


def test_no_held_out_images_are_one_line(dataset_zip, tmp_path, invoke):
    result = invoke(train.main, f"--outdir={tmp_path / 'out'}", f"--data={dataset_zip}", *TINY_RUN,
                    f"--val-data={dataset_zip}", "--val-num=0")
    assert result.exit_code == 2 and "--val-num=0: must be 1 or more" in result.output


def test_held_out_arrays_have_the_scale_and_conditions_of_the_training_data(tmp_path):
    config = TrainConfig(data="x", cond_image=True, val_data=str(tmp_path / "val"), augment=0.0,
                         arch="ncsnpp", cbase=8, cres=(1,), nblock=1, batch=8, workers=0)
    dataset = ImageFolderDataset(write_arrays(tmp_path / "data", 2.0), use_conditions=True)
    for scale, conditions, channels, words in (
            (None, True, 2, "another scale"), (2.0, False, 2, "no condition images"),
            (2.0, True, 3, "are 3x8x8")):
        folder = tmp_path / f"{words}"
        write_arrays(folder, scale, conditions, channels)
        with pytest.raises(ValueError, match=words):
            open_held_out(dataclasses.replace(config, val_data=str(folder)), dataset)
    write_arrays(tmp_path / "val", 2.0)
    trainer, told = Trainer(config, dataset, CPU), []
    trainer.ema.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["condition"]), with_kwargs=True)
    assert math.isfinite(held_out_loss(trainer))
    conditions = validation.open_held_out(config, dataset).get_batch(range(4))[2]
    assert torch.equal(torch.cat(told), dataset.cond_scaling.to_network(
        torch.from_numpy(conditions)))
