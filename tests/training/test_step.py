"""A step of training, part by part, against its formulas; ranks are played one after another."""

import contextlib
import copy
import functools
import itertools
import math
import multiprocessing
import operator
import threading

import numpy as np
import pytest
import torch
from tiny import write_dataset

from checkpoints import checkpoint
from images.dataset import ImageFolderDataset, order_at
from pfgmpp.unets import UNetBlock
from torch_utils import distributed, misc
from training.config import TrainConfig
from training.resume import State, restore_
from training.trainer import Trainer

CPU = torch.device("cpu")
SIZE = 40  # images of the data set


def make_trainer(data, dataset=None, start=0, **options):
    options = {"arch": "ncsnpp", "cbase": 8, "cres": (1, 2), "nblock": 1, "batch": 8, "lr": 1e-2,
               "lr_rampup": 0.0, "workers": 0, "augment": 0.0, "dropout": 0.0} | options
    dataset = dataset or ImageFolderDataset(data, use_labels=options.get("cond", False))
    trainer = Trainer(TrainConfig(data=str(data), **options), dataset, CPU)
    trainer.cur_nimg = start
    trainer.start()
    return trainer


def as_rank(monkeypatch, rank, world_size=2):
    monkeypatch.setattr(distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(distributed, "get_world_size", lambda: world_size)


def gradients(trainer):
    trainer._accumulate_gradients(trainer._sampled, trainer._next_batches())
    return {name: p.grad.clone() for name, p in trainer.net.named_parameters()
            if p.grad is not None}


def plain_gradients(trainer):
    """The gradient of this step by the definition of the loss, for all images at once."""
    config, dataset = trainer.config, trainer.dataset
    pixels, labels = dataset.get_batch(
        order_at(SIZE, config.seed, trainer.cur_nimg + np.arange(config.batch)))
    draws = trainer.loss_fn.draw_range(
        0, config.batch, dataset.image_shape,
        lambda block: torch.Generator().manual_seed(misc.mix_seed(
            config.seed, 2, trainer.cur_nimg // config.batch, block)), trainer.augment_pipe)
    net = copy.deepcopy(trainer.net)
    net.zero_grad(set_to_none=True)
    y, augment_labels = torch.from_numpy(pixels).float() / 127.5 - 1, None
    if trainer.augment_pipe:
        y, augment_labels = trainer.augment_pipe(y, draws.augment)
    sigma = draws.sigma.reshape(-1, 1, 1, 1)
    noisy = (y.double() + sigma * draws.scale.reshape(-1, 1, 1, 1) * draws.z.double()).float()
    denoised = net(noisy, sigma, torch.from_numpy(labels), augment_labels=augment_labels)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    (weight * (denoised - y) ** 2).sum(dim=(1, 2, 3)).mean().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def assert_close(found, expected, factor=1.0):
    """Equal but for float32 rounding, which is relative to the largest gradient of a tensor."""
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], factor * grad, rtol=1e-3, msg=name,
                                   atol=1e-4 * factor * float(grad.abs().max()) + 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("options", [
    {}, {"cond": True}, {"cond": True, "batch_gpu": 2}, {"augment": 0.5, "pfgmpp": True},
    {"cond": True, "augment": 0.5, "pfgmpp": True, "aug_dim": 3.0, "batch_gpu": 4}],
    ids=lambda options: ",".join(options) or "plain")
def test_the_gradient_is_that_of_the_loss_of_the_whole_batch(dataset_zip, options):
    trainer = make_trainer(dataset_zip, **options)
    for _ in range(2):
        assert_close(gradients(trainer), plain_gradients(trainer))
        trainer.cur_nimg += trainer.config.batch


def test_a_loss_scale_multiplies_the_gradient_of_every_rank(dataset_zip, monkeypatch):
    plain = plain_gradients(make_trainer(dataset_zip, cond=True))
    found = []
    for rank in range(2):
        as_rank(monkeypatch, rank)
        found.append(gradients(make_trainer(dataset_zip, cond=True, batch_gpu=2, ls=8.0)))
    # What DDP makes of them: their mean.
    assert_close({name: (found[0][name] + found[1][name]) / 2 for name in plain}, plain, 8.0)


def test_ranks_meet_in_the_last_round_only(dataset_zip):
    trainer, events = make_trainer(dataset_zip, batch_gpu=2), []

    class Coupled(torch.nn.Module):
        def forward(self, *args, **kwargs):
            events.append("evaluates")
            return trainer.net(*args, **kwargs)

        @contextlib.contextmanager
        def no_sync(self):
            events.append("alone")
            yield

    trainer.ddp = Coupled()
    trainer._accumulate_gradients(trainer._sampled, trainer._next_batches())
    assert events == [*["alone", "evaluates"] * 3, "evaluates"]


@pytest.mark.long
def test_no_two_rounds_steps_or_ranks_share_a_dropout_mask(dataset_zip, monkeypatch):
    seeds, manual_seed = [], torch.manual_seed
    for rank in range(2):
        as_rank(monkeypatch, rank)
        trainer = make_trainer(dataset_zip, dropout=0.5, batch_gpu=2)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "manual_seed",
                          lambda seed: (seeds.append(seed), manual_seed(seed))[1])
            for _ in range(3):
                trainer.train_step()
    assert len(seeds) == len(set(seeds)) == 2 * 3 * 2


@pytest.mark.parametrize("lr_rampup", [0.0, 24e-6])
def test_weights_move_by_adam(dataset_zip, lr_rampup):
    trainer = make_trainer(dataset_zip, lr=3e-3, lr_rampup=lr_rampup)
    first, second = {}, {}
    for k in range(5):
        before = {name: p.detach().clone() for name, p in trainer.net.named_parameters()}
        lr = 3e-3 * (min(8 * k / 24, 1) if lr_rampup else 1)
        trainer.train_step()
        for name, p in trainer.net.named_parameters():
            if p.grad is None:
                assert torch.equal(p, before[name])
                continue
            g = p.grad.double()
            first[name] = 0.9 * first.get(name, 0) + 0.1 * g
            second[name] = 0.999 * second.get(name, 0) + 0.001 * g**2
            step = first[name] / (1 - 0.9 ** (k + 1)) / (
                (second[name] / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
            moved = before[name].double() - p.detach().double()
            # Float32 weights of size 1 move in steps of 6e-8; the moments are float32 too.
            torch.testing.assert_close(moved, lr * step, rtol=1e-4, atol=3e-7, msg=name)


@pytest.mark.long
@pytest.mark.parametrize("rampup", [0.0, 2.0])
@pytest.mark.parametrize("options, decay", [
    ({}, lambda mimg: 1),
    ({"lr_decay": "rsqrt", "lr_decay_start": 3.0}, lambda mimg: 1 / math.sqrt(max(mimg / 3, 1))),
    ({"lr_decay": "rsqrt", "lr_decay_start": 0.5}, lambda mimg: 1 / math.sqrt(max(mimg / 0.5, 1))),
    ({"lr_decay": "cosine", "lr_decay_start": 4.0},
     lambda mimg: 1 if mimg < 4 else math.cos(math.pi * (mimg - 4) / 8 / 2) ** 2),
    ({"lr_decay": "cosine", "lr_decay_start": 0.0},
     lambda mimg: math.cos(math.pi * mimg / 12 / 2) ** 2),
    ({"lr_decay": "cosine", "lr_rampup": 2.0},
     lambda mimg: 1 if mimg < 2 else math.cos(math.pi * (mimg - 2) / 10 / 2) ** 2),
], ids=["none", "rsqrt-3", "rsqrt-0.5", "cosine-4", "cosine-0", "cosine-rampup"])
def test_the_learning_rate_rises_and_falls_with_the_images_seen(dataset_zip, rampup, options,
                                                                 decay):
    options = {"lr_rampup": rampup, "duration": 12.0} | options
    rampup = options["lr_rampup"]
    trainer = make_trainer(dataset_zip, lr=0.5, batch=8, **options)
    for mimg in (0, 0.25, 0.5, 1, 2, 3, 3.5, 4, 6, 8, 11, 12):
        trainer.cur_nimg = round(mimg * 1e6)
        expected = 0.5 * (min(mimg / rampup, 1) if rampup else 1) * decay(mimg)
        assert trainer.lr == pytest.approx(expected, rel=1e-9, abs=1e-12)
        trainer.train_step()
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-12)
    trainer.cur_nimg = 13_000_000  # a last batch may go beyond the end
    assert trainer.lr >= 0 and (trainer.lr == 0) == (options.get("lr_decay") == "cosine")


def norm_of(grads):
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))


SCALINGS = [{}, {"ls": 8.0}, {"precision": "fp16"}]  # a fixed loss scale, and a dynamic one


@pytest.mark.long
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999, 1.001, 100.0])
@pytest.mark.parametrize("options", SCALINGS, ids=str)
def test_the_gradient_is_clipped_to_a_norm_of_all_parameters(dataset_zip, share, options):
    plain = gradients(make_trainer(dataset_zip, **options))
    scale = {"ls": 8.0, "precision": 2.0**16}.get("".join(options), 1.0)
    norm = norm_of(plain) / scale  # of the gradient of the loss itself
    trainer = make_trainer(dataset_zip, clip_grad=share * norm, **options)
    gradients(trainer)
    bad = trainer._finish_gradients(trainer.net)
    found = {name: p.grad for name, p in trainer.net.named_parameters() if p.grad is not None}
    assert bad == 0 and found.keys() == plain.keys()
    for name, g in plain.items():
        torch.testing.assert_close(found[name], g * min(1, share), rtol=1e-5, atol=0)
        assert share < 1 or torch.equal(found[name], g), "below the limit nothing changes"
    assert norm_of(found) / scale == pytest.approx(min(share, 1) * norm, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("split", ["rounds", "ranks"])
def test_clipping_is_that_of_the_whole_batch_however_it_is_split(dataset_zip, monkeypatch, split):
    limit = 0.1 * norm_of(plain_gradients(make_trainer(dataset_zip)))
    whole = make_trainer(dataset_zip, clip_grad=limit)
    whole.train_step()
    if split == "rounds":
        trainer = make_trainer(dataset_zip, clip_grad=limit, batch_gpu=2)
        trainer.train_step()
    else:
        found = []
        for rank in range(2):
            as_rank(monkeypatch, rank)
            trainer = make_trainer(dataset_zip, clip_grad=limit)
            found.append(gradients(trainer))
        for name, p in trainer.net.named_parameters():  # what DDP makes of them: their mean
            if p.grad is not None:
                p.grad.copy_((found[0][name] + found[1][name]) / 2)
        trainer._finish_gradients(trainer.net)
    expected, found = ({name: p.grad for name, p in t.net.named_parameters() if p.grad is not None}
                       for t in (whole, trainer))
    assert norm_of(found) == pytest.approx(limit, rel=1e-5)
    assert_close(found, expected)


@pytest.mark.long
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])  # the square of the last is infinite
@pytest.mark.parametrize("options", SCALINGS, ids=str)
def test_a_step_that_is_not_finite_is_skipped_with_clipping_too(dataset_zip, value, options):
    trainer = make_trainer(dataset_zip, clip_grad=1.0, **options)
    trainer.train_step()
    accumulate = trainer._accumulate_gradients

    def broken(*args):
        accumulate(*args)
        next(p.grad for p in trainer.net.parameters() if p.grad is not None).view(-1)[0] = value

    trainer._accumulate_gradients = broken
    before = copy.deepcopy([trainer.net.state_dict(), trainer.ema.state_dict(),
                            trainer.optimizer.state_dict()["state"]])
    trainer.train_step()
    assert trainer.counters["bad_total"] == 1
    assert checkpoint.digest(before) == checkpoint.digest(
        [trainer.net.state_dict(), trainer.ema.state_dict(),
         trainer.optimizer.state_dict()["state"]])
    trainer._accumulate_gradients = accumulate
    trainer.train_step()
    assert trainer.counters["bad_total"] == 1
    assert all(p.isfinite().all() for p in trainer.net.parameters())


def test_no_gradient_is_not_clipped(dataset_zip):
    trainer = make_trainer(dataset_zip, clip_grad=1.0)
    gradients(trainer)
    for p in trainer.net.parameters():
        if p.grad is not None:
            p.grad.zero_()
    assert trainer._finish_gradients(trainer.net) == 0
    assert all(not p.grad.any() for p in trainer.net.parameters() if p.grad is not None)


@pytest.mark.long
@pytest.mark.parametrize("ema, rampup, beta_of_step", [
    (1.0, 0.05, lambda nimg: 0.5 ** (8 / max(0.05 * nimg, 1e-8))),  # ramping up
    (10e-6, 0.05, lambda nimg: 0.5 ** (8 / max(min(10, 0.05 * nimg), 1e-8))),
    (100e-6, None, lambda nimg: 0.5 ** (8 / 100))],  # after a transfer
    ids=["rampup", "both", "transfer"])
def test_the_average_follows_the_images_before_the_step(dataset_zip, ema, rampup, beta_of_step):
    trainer = make_trainer(dataset_zip, ema=ema)
    trainer.ema_rampup = rampup
    average = {name: p.detach().double() for name, p in trainer.net.named_parameters()}
    trainer.cur_nimg = 8 * 4  # where both kinds of half-life have some length
    for _ in range(12):
        beta = beta_of_step(trainer.cur_nimg)
        trainer.train_step()
        for name, p in trainer.net.named_parameters():
            average[name] = beta * average[name] + (1 - beta) * p.detach().double()
    for name, p in trainer.ema.named_parameters():
        torch.testing.assert_close(p.double(), average[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision, dtype", [
    ("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_network_computes_in_the_precision_asked_for(dataset_zip, precision, dtype):
    trainer, seen = make_trainer(dataset_zip, precision=precision), []
    trainer.net.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    trainer.train_step()
    assert seen == [dtype] and trainer.ema.compute_dtype == dtype
    assert all(p.dtype == torch.float32 for p in trainer.net.parameters())


@pytest.mark.long
@pytest.mark.parametrize("options", [
    {}, {"batch_gpu": 2, "augment": 0.5, "precision": "bf16", "cond": True, "label_dropout": 0.5}],
    ids=str)
def test_a_run_that_checkpoints_writes_what_another_does(dataset_zip, options):
    plain, other = (make_trainer(dataset_zip, dropout=0.3, checkpoint_blocks=checkpoint_blocks,
                                 **options) for checkpoint_blocks in (False, True))
    calls = []
    blocks = [block for block in other.net.modules() if isinstance(block, UNetBlock)]
    for block in blocks:
        block.norm0.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        plain.train_step()
        other.train_step()
    assert len(calls) == 2 * len(blocks) * other.rounds * 3
    written, expected = other.state(), plain.state()
    assert written["options"].pop("checkpoint_blocks") is True
    assert expected["options"].pop("checkpoint_blocks") is False
    assert checkpoint.digest(written) == checkpoint.digest(expected)
    assert not other.ema.training


def test_a_network_without_blocks_refuses_to_checkpoint_them(dataset_zip, monkeypatch):
    monkeypatch.delattr("pfgmpp.unets._UNet.checkpoint_blocks")
    with pytest.raises(ValueError, match="--checkpoint-blocks=1: a SongUNet has no blocks"):
        make_trainer(dataset_zip, checkpoint_blocks=True)


# ---- stable targets -----------------------------------------------------------------------------

def recorded(trainer):
    """Makes a trainer keep what its loss is given beside the images."""
    given, loss_fn = [], trainer.loss_fn

    class Recorded:
        draw_range = loss_fn.draw_range

        def __call__(self, *args, **kwargs):
            given.append({"labels": args[2], **kwargs})
            return loss_fn(*args, **kwargs)

    trainer.loss_fn = Recorded()
    return given


def test_the_other_reference_images_are_an_epoch_of_a_stream_of_their_own(dataset_zip):
    trainer = make_trainer(dataset_zip, stf=True, rbatch=8 + SIZE // 2)
    order = trainer._reference_order()
    others = [index for indices in itertools.islice(order, 2) for index in indices[8:]]
    assert sorted(others) == list(range(SIZE))
    assert others != order_at(SIZE, trainer.config.seed, range(SIZE)).tolist()


@pytest.mark.parametrize("rbatch", [SIZE, SIZE + 1, 4096])
def test_the_reference_of_a_small_data_set_is_all_of_it_once(dataset_zip, rbatch):
    order = make_trainer(dataset_zip, stf=True, rbatch=rbatch)._reference_order()
    for _ in range(3):
        assert sorted(next(order)) == list(range(SIZE))


def reference_indices(seed, nimg, batch, rbatch):
    """As runs have always had them: the batch, then images of a stream of their own."""
    extra = rbatch - batch
    return [*order_at(SIZE, seed, nimg + np.arange(batch)),
            *order_at(SIZE, misc.mix_seed(seed, 4), nimg // batch * extra + np.arange(extra))]


@pytest.mark.parametrize("options", [
    {}, {"cond": True}, {"workers": 2}, {"data_on_device": "1"},
    pytest.param({"workers": 1, "cache": False}, marks=pytest.mark.long)],
    ids=lambda options: ",".join(options) or "plain")
@pytest.mark.parametrize("start", [0, 44])  # of a resumed run that had another batch before
def test_the_reference_batch_is_a_function_of_seed_and_step(dataset_zip, start, options):
    dataset = ImageFolderDataset(dataset_zip, use_labels=options.get("cond", False),
                                 cache=options.get("cache", True))
    trainer = make_trainer(dataset_zip, dataset, stf=True, rbatch=28, seed=5, batch_gpu=4,
                           start=start, **options)
    given = recorded(trainer)
    for _ in range(3):
        trainer.train_step()
    for k, seen in enumerate(given):
        images, labels = dataset.get_batch(reference_indices(5, start + k // 2 * 8, 8, 28))
        assert torch.equal(seen["reference"], torch.from_numpy(images).float() / 127.5 - 1)
        assert torch.equal(seen["reference_labels"], torch.from_numpy(labels))
    assert len(given) == 3 * 2
    trainer.close()


@pytest.mark.long
def test_the_readers_of_both_streams_end_with_the_trainer(dataset_zip):
    trainer = make_trainer(dataset_zip, ImageFolderDataset(dataset_zip), stf=True, rbatch=16,
                           workers=1)
    trainer.train_step()
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    trainer.close()
    assert not multiprocessing.active_children()
    trainer = make_trainer(dataset_zip, ImageFolderDataset(dataset_zip, cache=True), stf=True,
                           rbatch=16, workers=1)
    before = threading.active_count()
    trainer.train_step()
    assert threading.active_count() == before + 2
    trainer.close()
    assert threading.active_count() == before


def test_the_time_of_waiting_is_that_for_both_streams(dataset_zip):
    trainer = make_trainer(dataset_zip, stf=True, rbatch=16)
    for stream in (trainer._batches, trainer._references):
        stream._sec = 3.0
    assert trainer.take_data_sec() == 6.0


def test_stable_targets_with_label_vectors_are_refused(tmp_path):
    data = write_dataset(tmp_path / "vectors.zip", vectors=True)
    with pytest.raises(ValueError, match="labels of .*vectors.zip are vectors"):
        make_trainer(data, stf=True, rbatch=16, cond=True)
    make_trainer(data, stf=True, rbatch=16)


# ---- the dynamic loss scale, and what a state holds ---------------------------------------------

def test_a_dynamic_loss_scale_doubles_after_two_thousand_good_steps(dataset_zip):
    trainer = make_trainer(dataset_zip, precision="fp16")
    trainer.counters["good_since_change"] += 1998
    trainer.train_step()
    assert float(trainer.loss_scale) == 2.0**16
    trainer.train_step()
    assert float(trainer.loss_scale) == 2.0**17 and trainer.counters["good_since_change"] == 0


def leaves(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) \
        if isinstance(value, list) else None
    if items is None:
        yield path, value
    else:
        for key, inner in items:
            yield from leaves(inner, (*path, key))


def changed(value):
    if isinstance(value, torch.Tensor):
        return value + 1
    return {type(None): 0.25, bool: True, float: 0.125}.get(type(value), 16)


def with_leaves_changed(state, paths):
    copied = copy.deepcopy(state)
    for path in paths:
        inner = functools.reduce(operator.getitem, path[:-1], copied)
        inner[path[-1]] = changed(inner[path[-1]])
    return copied


def test_every_number_of_a_state_is_restored(dataset_zip):
    options = {"precision": "fp16", "ema": 1e-5}
    trainer = make_trainer(dataset_zip, **options)
    trainer.train_step()
    state = copy.deepcopy(trainer.state())
    del state["progress"]["draws"]  # of the code, not of the run
    tensors = [path for path, _ in leaves({key: state[key] for key in ("net", "ema")})]
    tensors += [("optimizer", "state", i, name)
                for i, moments in state["optimizer"]["state"].items() for name in moments]
    numbers = [path for path, _ in leaves({"progress": state["progress"]})]
    assert len(tensors) > 100 and len(numbers) >= 10
    fresh = make_trainer(dataset_zip, **options)
    for paths in (tensors, *([path] for path in numbers)):
        restore_(fresh, State("x.pt", with_leaves_changed(state, paths)))
        found = fresh.state()
        for path in paths:
            value, restored = (functools.reduce(operator.getitem, path, tree)
                               for tree in (state, found))
            assert checkpoint.digest(restored) == checkpoint.digest(changed(value)), path
            assert checkpoint.digest(restored) != checkpoint.digest(value), path


def test_a_foreign_state_without_a_count_goes_on_at_the_kimg_of_its_name(dataset_zip, capsys):
    trainer = make_trainer(dataset_zip)
    trainer.train_step()
    state = copy.deepcopy(trainer.state())
    state |= {"format": "edm-training-state", "progress": {"cur_nimg": None}, "D_recorded": True}
    for name, nimg in (("runs/training-state-000123.pt", 123_000), ("runs/state.pt", 0)):
        restore_(trainer, State(name, state))
        assert trainer.cur_nimg == nimg
        assert f"continues at {nimg // 1000} kimg" in capsys.readouterr().out
    assert math.isfinite(trainer.lr)
