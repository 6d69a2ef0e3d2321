import contextlib
import dataclasses
import functools
import json
import math
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from host_reads import HostReads
from run_dirs import newest_state
from scripts import ROOT
from tiny import TINY_RUN, write_dataset

import train
from checkpoints.checkpoint import build_ema, digest, kimg_tag, load, save
from images.dataset import ImageFolderDataset, order_at
from pfgmpp.samplers import SampleBatch, SamplerConfig
from torch_utils import training_stats
from torch_utils.misc import mix_seed
from training import sample_grids
from training.config import TrainConfig
from training.trainer import DivergedError, Trainer
from training.training_loop import Evaluator, TickRunner, append_stats

CPU = torch.device("cpu")


def make_trainer(data, **options):
    options = {"arch": "ncsnpp", "cbase": 8, "cres": (1, 2), "nblock": 1, "batch": 8, "lr": 1e-2,
               "lr_rampup": 0.0, "workers": 0, "augment": 0.0} | options
    trainer = Trainer(TrainConfig(data=str(data), **options), ImageFolderDataset(data), CPU)
    trainer.start()
    return trainer


def break_loss(trainer, value):
    loss_fn = trainer.loss_fn
    good = loss_fn.__call__

    def bad(*args, **kwargs):
        loss = good(*args, **kwargs)
        return loss * torch.where(torch.arange(len(loss)) == 3, value, 1.0)[:, None, None, None]

    class Broken:
        draw_range = loss_fn.draw_range
        __call__ = staticmethod(bad)

    trainer.loss_fn = Broken()
    return loss_fn


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_with_bad_gradients_changes_nothing_but_the_count(dataset_zip, value):
    trainer = make_trainer(dataset_zip)
    trainer.train_step()
    loss_fn = break_loss(trainer, value)

    def weights():
        return [digest(dict(m.state_dict())) for m in (trainer.net, trainer.ema)]

    def moments():
        return digest(trainer.optimizer.state_dict()["state"])

    before, moments_before = weights(), moments()
    trainer.train_step()
    assert weights() == before and moments() == moments_before
    assert trainer.cur_nimg == 16 and trainer.counters["bad_total"] == 1
    trainer.loss_fn = loss_fn
    trainer.train_step()
    assert all(a != b for a, b in zip(weights(), before, strict=True))
    assert trainer.counters["bad_row"] == 0 and trainer.counters["bad_total"] == 1


def test_host_reads_are_seen():
    with HostReads() as reads:
        float(torch.ones([]))
        torch.arange(3)[torch.arange(3) > 1]
    assert reads.found == ["_local_scalar_dense", "index"]


@pytest.mark.long
@pytest.mark.parametrize("options", [
    {}, {"augment": 0.12}, {"pfgmpp": True}, {"pfgmpp": True, "aug_dim": 1.0, "batch_gpu": 4},
    {"precision": "bf16"}, {"precision": "fp16"}, {"precond": "vp"}, {"precond": "ve"},
    {"arch": "adm", "cbase": 32}, {"stf": True, "rbatch": 16, "augment": 0.0},
    {"stf": True, "rbatch": 16, "augment": 0.0, "cond": True}, {"cond": True, "label_dropout": 0.3},
    {"patch": 4, "patches": 3},
])
def test_a_step_reads_nothing_from_the_device(dataset_zip, options):
    data = ImageFolderDataset(dataset_zip, use_labels=options.get("cond", False),
                              patch=options.get("patch"))
    config = TrainConfig(data=str(dataset_zip), **{
        "arch": "ncsnpp", "cbase": 8, "cres": (1, 2), "nblock": 1, "batch": 8, "workers": 0,
        **options})
    trainer = Trainer(config, data, CPU)
    trainer.start()
    trainer.train_step()
    with HostReads() as reads:
        trainer.train_step()
    assert not reads.found


def test_gradients_beyond_what_adam_can_square_are_bad(dataset_zip):
    trainer = make_trainer(dataset_zip, ls=1e22)
    trainer.train_step()
    grads = [p.grad for p in trainer.net.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    assert trainer.counters["bad_total"] == 1


@pytest.mark.long
def test_too_many_bad_steps_in_a_row_end_the_run_and_name_the_step(dataset_zip):
    trainer = make_trainer(dataset_zip, max_bad_steps=2)
    trainer.train_step()
    loss_fn = break_loss(trainer, math.nan)
    for _ in range(2):
        trainer.train_step()
    trainer.check_divergence()  # two are allowed
    trainer.loss_fn = loss_fn
    trainer.train_step()
    break_loss(trainer, math.nan)
    for _ in range(3):
        trainer.train_step()
    with pytest.raises(DivergedError, match="3 steps in a row .* from step 4 "):
        trainer.check_divergence()


def test_a_dynamic_loss_scale_halves_on_overflow_and_leaves_the_step_alone(dataset_zip):
    """A power-of-two scale changes no bit of a float32 gradient that Adam sees."""
    plain = make_trainer(dataset_zip, dropout=0.0, ls=1.0)
    scaled = make_trainer(dataset_zip, dropout=0.0, precision="fp16")
    assert float(scaled.loss_scale) == 2.0**16
    for trainer in (plain, scaled):
        trainer.train_step()
    for a, b in zip(plain.net.parameters(), scaled.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    break_loss(scaled, math.inf)
    scaled.train_step()
    assert float(scaled.loss_scale) == 2.0**15


def test_fixed_loss_scaling_multiplies_the_gradient(dataset_zip):
    grads = []
    for ls in (1.0, 8.0):
        trainer = make_trainer(dataset_zip, dropout=0.0, ls=ls)
        trainer._accumulate_gradients(trainer._sampled, trainer._next_batches())
        grads.append([p.grad.clone() for p in trainer.net.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a * 8, b)


def test_the_gradient_is_the_sum_over_pixels_and_the_mean_over_images(dataset_zip):
    trainer = make_trainer(dataset_zip, dropout=0.0)
    trainer._accumulate_gradients(trainer._sampled, trainer._next_batches())
    images, labels = trainer.dataset.get_batch(order_at(40, trainer.config.seed, range(8)))
    draws = trainer._draw(0)
    net = Trainer(trainer.config, trainer.dataset, CPU).net  # the same initial weights
    y = torch.from_numpy(images).float() / 127.5 - 1
    loss = trainer.loss_fn(net, y, torch.from_numpy(labels), draws=draws)
    loss.sum(dim=(1, 2, 3)).mean().backward()
    for a, b in zip(trainer.net.parameters(), net.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_learning_rate_rises_linearly_in_images(dataset_zip):
    trainer = make_trainer(dataset_zip, lr=0.5, lr_rampup=32e-6)
    rates = []
    for _ in range(6):
        rates.append(trainer.lr)
        trainer.train_step()
        assert trainer.optimizer.param_groups[0]["lr"] == rates[-1]
    assert rates == pytest.approx([0, 0.125, 0.25, 0.375, 0.5, 0.5])


def test_ticks_are_a_function_of_the_images_seen():
    config = TrainConfig(data="x", batch=64, tick=0.1)  # 100 images: two steps
    ticks = [config.tick_at(64 * (k + 1)) for k in range(6)]
    assert ticks == [0, None, 1, None, 2, None]
    short = TrainConfig(data="x", batch=64, tick=0.01)
    assert [short.tick_at(64 * (k + 1)) for k in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("tick, every, duration", [
    (0.1, 0.3, 0.002), (0.1, 0.05, 0.001), (0.3, 5.0, 0.002), (0.064, 0.5, 0.00192)])
def test_the_evaluations_to_come_are_those_that_the_loop_makes(tick, every, duration):
    config = TrainConfig(data="x", batch=64, tick=tick, eval=every, eval_ref="x",
                         duration=duration)
    positions = range(64, config.total_nimg + 64, 64)
    due = [nimg for nimg in positions if nimg >= config.total_nimg
           or (config.tick_at(nimg) is not None and config.is_eval_due(nimg))]
    assert len(due) >= 1
    for nimg in (0, *positions):
        assert config.num_evals_after(nimg) == sum(nimg < later for later in due)


def test_options_round_trip_through_json():
    config = TrainConfig(data="x", pfgmpp=True, aug_dim=math.inf, cres=(1, 2), batch_gpu=4,
                         ls=2.0, duration=1.5)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="'wat'"):
        TrainConfig.from_dict({"data": "x", "wat": 1})
    with pytest.raises(ValueError, match="'batch'"):
        TrainConfig.from_dict({"data": "x", "batch": "many"})


@pytest.mark.parametrize("world_size, batch_gpu, expected", [
    (1, None, (24, 1)), (2, None, (12, 1)), (2, 4, (4, 3)), (4, 100, (6, 1))])
def test_rounds_multiply_back_to_the_batch(world_size, batch_gpu, expected):
    config = TrainConfig(data="x", batch=24, batch_gpu=batch_gpu)
    assert config.rounds(world_size) == expected
    assert math.prod(expected) * world_size == 24


def test_a_batch_that_does_not_divide_names_the_nearest():
    with pytest.raises(ValueError, match="20 or 25"):
        TrainConfig(data="x", batch=24).rounds(5)
    with pytest.raises(ValueError, match="4 or 6"):
        TrainConfig(data="x", batch=24, batch_gpu=5).rounds(2)


@pytest.mark.parametrize("batch, world_size, batch_gpu, expected", [
    (4096, 1, 32, 32), (4096, 64, 32, 32), (4096, 256, 32, 16), (4096, 8, 33, 32),
    (24, 2, 5, 4), (24, 2, 100, 12), (24, 8, 2, 1), (14, 2, 6, 1), (24, 2, None, None),
    (24, 5, 3, 3), (24, 48, 3, 3)])
def test_a_micro_batch_of_a_preset_fits_any_number_of_processes(batch, world_size, batch_gpu,
                                                                expected):
    config = TrainConfig(data="x", batch=batch, batch_gpu=batch_gpu)
    fitting = config.with_fitting_batch_gpu(world_size)
    assert fitting == dataclasses.replace(config, batch_gpu=expected)
    if batch % world_size:  # which is another mistake
        with pytest.raises(ValueError, match="can't be split"):
            fitting.rounds(world_size)
        return
    micro, rounds = fitting.rounds(world_size)
    assert micro * rounds * world_size == batch


def test_kimg_tags_sort_and_show_short_ticks():
    assert kimg_tag(12_345, fractional=False) == "000012"
    assert kimg_tag(320, fractional=True) == "000000.320"
    assert kimg_tag(1_234_567_890, fractional=False) == "1234567"


def test_a_checkpoint_with_one_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "training-state-000001.pt"
    save(path, {"format": "pfgmpp-training-state", "net": {"w": torch.arange(4000.0)},
                "progress": {"cur_nimg": 1000}})
    assert torch.equal(load(path)["net"]["w"], torch.arange(4000.0))
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    at = data.index(np.arange(4000, dtype=np.float32).tobytes())
    for bit in rng.integers(0, 16_000 * 8, 20):
        torn = bytearray(data)
        torn[at + bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(torn)
        with pytest.raises(ValueError, match="training-state-000001.pt: damaged"):
            load(path)
    assert newest_state(tmp_path)[0] is None


def test_every_truncation_of_a_checkpoint_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    save(path, {"format": "pfgmpp-training-state", "net": {"w": torch.arange(40.0)}})
    data = path.read_bytes()
    for size in range(0, len(data) - 1, 97):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"x\.pt: "):
            load(path)


def test_a_newer_format_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"format": "pfgmpp-training-state", "version": 2, "checksum": ""}, path)
    with pytest.raises(ValueError, match="version 2; this code reads version 1"):
        load(path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a training state"):
        load(path)
    torch.save(torch.nn.Linear(1, 1), path)  # a pickled module is never run
    with pytest.raises(ValueError, match="a pickled module of the class 'torch.nn.modules.linear"):
        load(path)


def test_statistics_are_those_of_all_elements():
    collector = training_stats.Collector(CPU)
    a, b = torch.randn(7, 3), torch.randn(11)
    training_stats.report("x", a)
    training_stats.report("x", b)
    training_stats.report("y", 2.0)
    collector.update()
    everything = torch.cat([a.flatten(), b]).double()
    stats = collector.as_dict()
    assert stats["x"]["num"] == 32
    assert stats["x"]["mean"] == pytest.approx(everything.mean().item())
    assert stats["x"]["std"] == pytest.approx(everything.std(unbiased=False).item())
    assert stats["y"] == {"num": 1, "mean": 2.0, "std": 0.0}
    collector.update()
    assert collector.as_dict() == {}


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_stopped_tick_had_collected_counts_once(rank, monkeypatch):
    collector = training_stats.Collector(CPU)
    training_stats.report("x", torch.tensor([1.0, 3.0]))
    collector.update()
    moments = collector.moments
    monkeypatch.setattr("torch_utils.distributed.get_rank", lambda: rank)
    training_stats.resume(moments, CPU)
    training_stats.report("x", torch.tensor([5.0]))
    collector.update()
    assert collector.as_dict()["x"]["num"] == (3 if rank == 0 else 1)


def test_a_tick_that_was_taken_over_is_not_taken_over_again(dataset_zip, tmp_path):
    config = TrainConfig(data=str(dataset_zip), arch="ncsnpp", cbase=8, cres=(1,), nblock=1,
                         batch=8, augment=0.0, workers=0)
    trainer = Trainer(config, ImageFolderDataset(dataset_zip), CPU)
    ticks = TickRunner(trainer, tmp_path, [], SimpleNamespace())
    left = {"stats": {"Loss/loss": [2.0, 4.0, 10.0]}, "is_due": True}
    trainer.unfinished = left
    assert trainer.state()["progress"]["unfinished"] == left
    assert ticks.resume() is True
    assert trainer.state()["progress"]["unfinished"] is None
    assert ticks.resume() is False
    training_stats.Collector(CPU)  # forgets what the others have left


@pytest.mark.parametrize("solver, steps", [("heun", 18), ("ipndm", 3), ("euler", 2)])
def test_grids_and_scores_are_sampled_as_asked(solver, steps, dataset_zip, tmp_path, monkeypatch):
    asked = []
    real = SamplerConfig.sample

    def sample(config, *args, **kwargs):
        asked.append((config.solver or "heun", config.num_steps))
        return real(config, *args, **kwargs)

    monkeypatch.setattr(SamplerConfig, "sample", sample)
    flags = [] if solver == "heun" else [f"--eval-solver={solver}", f"--eval-steps={steps}"]
    train.main([f"--data={dataset_zip}", f"--outdir={tmp_path}", "--name=run", *TINY_RUN,
                "--samples=4", "--duration=0.000008", "--eval=1", f"--eval-ref={dataset_zip}",
                "--eval-num=3", "--eval-detector=pixels", "--device=cpu", *flags],
               standalone_mode=False)
    assert len(asked) >= 2 and set(asked) == {(solver, steps)}
    [line] = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    recorded = json.loads(line)["sampler"]
    assert (recorded["solver"] or "heun", recorded["num_steps"]) == (solver, steps)
    assert recorded["nfe"] == (35 if solver == "heun" else steps)


def best_scores(values, *, compared_by=None, is_written=None, is_lower_better=True):
    """Returns the best score after each of some, and the names of the states that were written.

    `compared_by` is what each may be compared by, `is_written` whether its state could be.
    """
    class Score:
        name = "FID"
        compared_by = "the same"

        def __call__(self):
            if kinds:
                self.compared_by = kinds.pop(0)
            return {"fid": values.pop(0)}

    Score.is_lower_better, score = is_lower_better, Score()
    values, kinds, verdicts = list(values), list(compared_by or []), list(is_written or [])
    saved, best = [], []

    def save(name, state):
        saved.append(name)
        return verdicts.pop(0) if verdicts else True

    trainer = SimpleNamespace(best_score=None, best_score_of=None, rank=0, cur_nimg=1000,
                              state=dict)
    ticks = TickRunner.__new__(TickRunner)
    ticks._trainer, ticks._evaluators = trainer, [score]
    ticks._files = SimpleNamespace(save=save)
    for _ in range(len(values)):
        said = ticks._evaluate(score, SimpleNamespace(above_bar=contextlib.nullcontext))
        assert list(said) == ["Metrics/fid"]
        best.append(trainer.best_score)
    return best, saved


def test_a_score_that_is_no_number_is_never_the_best(capsys):
    best, saved = best_scores([math.nan, 5.0, math.nan, 7.0, 4.0])
    assert best == [None, 5.0, 5.0, 5.0, 4.0] and len(saved) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FID nan at 1 kimg" and lines[3].endswith("; the lowest so far is 5")


def test_the_best_of_scores_that_should_be_high_is_the_highest(capsys):
    best, saved = best_scores([30.0, math.nan, 29.0, 31.0, math.inf], is_lower_better=False)
    assert best == [30.0, 30.0, 30.0, 31.0, math.inf] and len(saved) == 3
    lines = capsys.readouterr().out.splitlines()
    assert ", the highest so far: kept" in lines[0]
    assert lines[2].endswith("the highest so far is 30")


def test_a_best_state_that_could_not_be_written_is_tried_again():
    best, saved = best_scores([5.0, 6.0, 4.0], is_written=[False, True, False])
    assert best == [None, 6.0, 6.0] and len(saved) == 3


def test_scores_of_another_kind_are_never_compared():
    """Another reference or number of samples begins anew, whatever the scores are."""
    best, saved = best_scores([5.0, 9.0, 8.0, 4.0], compared_by=["a", "b", "b", "a"])
    assert best == [5.0, 9.0, 8.0, 4.0] and len(saved) == 4


def test_a_score_says_what_it_can_be_compared_by(dataset_zip, tmp_path):
    def compared_by(**options):
        config = TrainConfig(data=str(dataset_zip), arch="ncsnpp", cbase=8, cres=(1,), nblock=1,
                             batch=8, augment=0.0, workers=0, eval=1.0, eval_detector="pixels",
                             **{"eval_num": 4, "eval_ref": str(dataset_zip)} | options)
        trainer = Trainer(config, ImageFolderDataset(dataset_zip), CPU)
        return Evaluator(trainer, tmp_path / "metrics.jsonl").compared_by

    other = write_dataset(tmp_path / "other.zip", num=9)
    base = compared_by()
    assert base == compared_by(tick=7.0, lr=5.0) and base["precision"] == "fp32"
    assert len({str(kind) for kind in (base, compared_by(eval_num=5),
                                       compared_by(eval_ref=str(other)))}) == 3


def test_stats_lines_are_json_even_with_nan(tmp_path):
    append_stats(tmp_path / "s.jsonl", {"a": {"mean": math.nan}, "b": math.inf, "c": 1})
    line = (tmp_path / "s.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"a": {"mean": None}, "b": None, "c": 1}


def test_seeds_depend_on_every_word_and_their_order():
    words = [(1, 2), (2, 1), (1, 2, 0), (1,), (0, 1)]
    assert len({mix_seed(*w) for w in words}) == len(words)


def test_files_of_format_version_1_are_read_for_ever():
    """The file in tests/data is never written again; its weights are ramps of known slope."""
    content = load(ROOT / "tests/data/network-snapshot-v1.pt")
    assert content["progress"] == {"cur_nimg": 1234}
    assert TrainConfig.from_dict(content["options"]).aug_dim == 128
    net = build_ema(content)
    assert net.D == 128 and net.img_resolution == 4 and not net.training
    for i, p in enumerate(net.parameters()):
        ramp = torch.linspace(-1, 1, p.numel()).reshape(p.shape) * (0.1 + i % 3 * 0.05)
        torch.testing.assert_close(p.contiguous(), ramp)
    assert net(torch.zeros(2, 1, 4, 4), torch.tensor(1.0)).isfinite().all()


@pytest.mark.parametrize("claim", [
    torch.zeros(1).expand(10**6, 10**6),  # a view of four bytes that would become terabytes
    functools.reduce(lambda x, _: [x, x], range(60), 1),  # 2^60 items by sharing
])
def test_files_that_claim_more_than_they_hold_are_refused(tmp_path, claim):
    path = tmp_path / "x.pt"
    torch.save({"format": "pfgmpp-network-snapshot", "version": 1, "x": claim}, path)
    with pytest.raises(ValueError, match="x.pt: damaged"):
        load(path)


def test_compressed_files_are_refused(tmp_path):
    path, packed = tmp_path / "x.pt", tmp_path / "packed.pt"
    save(path, {"format": "pfgmpp-network-snapshot", "x": torch.zeros(1000)})
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w") as target:
        for name in source.namelist():
            compression = zipfile.ZIP_DEFLATED if name.endswith("0") else zipfile.ZIP_STORED
            target.writestr(name, source.read(name), compress_type=compression)
    with pytest.raises(ValueError, match="packed.pt: "):
        load(packed)


@pytest.mark.parametrize("change, message", [
    ({"model_channels": 10**9}, "model_channels"), ({"num_blocks": 10**9}, "num_blocks"),
    ({"class_name": "os.system"}, "os.system"), ({"wat": 1}, "wat"),
    ({"img_resolution": 8}, "lacks the tensor"),  # every block has another name
    ({"num_blocks": 2}, "lacks the tensor"), ({"pfgmpp": True, "D": -1.0}, "D=-1"),
])
def test_a_snapshot_that_describes_another_network_builds_nothing(change, message):
    content = load(ROOT / "tests/data/network-snapshot-v1.pt")
    with pytest.raises(ValueError, match=message):
        build_ema({**content, "network": {**content["network"], **change}})


@pytest.mark.long
def test_grids_show_the_classes_that_have_images(tmp_path, monkeypatch):
    """Classes may be numbered from anywhere: here the two classes are 40 and 41, of 42."""
    source, data = write_dataset(tmp_path / "source.zip", num=12), tmp_path / "data.zip"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(data, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "dataset.json":
                labels = [[key, k + 40] for key, k in json.loads(content)["labels"]]
                content = json.dumps({"labels": labels})
            new.writestr(name, content)
    shown = []
    monkeypatch.setattr(sample_grids, "image_grid",
                        lambda rows, labels: shown.append((rows, labels)))
    monkeypatch.setattr(sample_grids, "save_png", lambda path, picture: None)
    dataset = ImageFolderDataset(data, use_labels=True, xflip=True)
    config = TrainConfig(data=str(data), cond=True, arch="ncsnpp", cbase=8, cres=(1, 2), nblock=1,
                         batch=8, samples=6)
    trainer = Trainer(config, dataset, CPU)
    sample_grids.save_real_grid(trainer, tmp_path / "reals.png")
    sample_grids.sample_grid(trainer)
    (reals, real_labels), (samples, sample_labels) = shown
    assert real_labels == sample_labels == ["40", "41"]
    assert [len(row) for row in reals] == [len(row) for row in samples] == [3, 3]
    assert reals[0].max() < 120 <= reals[1].min()  # brightness tells the class


def test_pictures_of_a_run_show_the_window(tmp_path, monkeypatch):
    """Data from -1000 to 1000 in a window from -160 to 240: black and white outside of it."""
    values = np.linspace(-1000, 1000, 64, dtype=np.float32).reshape(1, 8, 8)
    (tmp_path / "data/cond").mkdir(parents=True)
    for k in range(4):
        np.save(tmp_path / f"data/{k}.npy", values)
        np.save(tmp_path / f"data/cond/{k}.npy", values)
    scale = {"center": [0.0], "spread": [1000.0]}
    (tmp_path / "data/dataset.json").write_text(json.dumps({"scale": scale, "cond_scale": scale}))
    shown = []
    monkeypatch.setattr(sample_grids, "image_grid", lambda rows, labels: shown.append(rows))
    monkeypatch.setattr(sample_grids, "save_png", lambda path, picture: None)
    made = torch.from_numpy(values)[None] / 1000  # as if the network had made the data
    monkeypatch.setattr(sample_grids, "generate_images", lambda net, batches, **_: [
        SampleBatch(list(seeds), made.expand(len(seeds), -1, -1, -1), None) for seeds in batches])
    dataset = ImageFolderDataset(tmp_path / "data", use_conditions=True)
    config = TrainConfig(data="x", cond_image=True, arch="ncsnpp", cbase=8, cres=(1, 2), nblock=1,
                         batch=4, samples=4, window=(40, 400))
    trainer = Trainer(config, dataset, CPU)
    sample_grids.save_real_grid(trainer, tmp_path / "reals.png")
    sample_grids.sample_grid(trainer)
    expected = np.clip((values + 160) / 400 * 255, 0, 255)
    pictures = [picture for rows in shown for row in rows for picture in row]
    assert len(pictures) > 8
    for picture in pictures:
        np.testing.assert_allclose(picture, expected, atol=1)
    assert TrainConfig.from_dict(config.to_dict()) == config
