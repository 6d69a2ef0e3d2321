"""Few-step runs: their steps against the formulas, their states, their files and refusals."""

import copy
import dataclasses
import functools
import itertools
import json
import math
import re
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from scripts import run_script
from snapshots import with_network, write_snapshot
from tiny import TINY_NETWORK, write_dataset
from torch.utils.flop_counter import FlopCounterMode

import dataset_tool
import distill
import generate
import likelihood
import sweep
import train
from checkpoints import checkpoint
from checkpoints.checkpoint import digest, load
from images.dataset import ImageFolderDataset, order_at
from pfgmpp import few_steps, samplers, schedules
from reports.run_record import RunRecord
from sampling import sweeps
from torch_utils import distributed, misc
from training import distill_config, estimate, sample_grids
from training.config import TrainConfig
from training.distill_config import METHOD_DEFAULTS, DistillConfig
from training.estimate import Estimate
from training.resume import NETWORK_OPTIONS, RESUME_MAY_CHANGE, State, changed_options, restore_
from training.teacher import Teacher
from training.trainer import Trainer

pytestmark = pytest.mark.long  # all of them train

CPU = torch.device("cpu")
INF = math.inf
DIMS = (2, 64, INF)
METHODS = ("ect", "cd", "ipfm")
PAIRS = list(zip(METHODS, DIMS, strict=True))
FIRST_PAIR = [PAIRS[0], *(pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS[1:])]
BATCH = 8
OF_METHOD = {"ect": {"dropout": 0.3}, "cd": {"cd_scales": 6, "dropout": 0.3},
             "ipfm": {"ipfm_steps": 2, "optim": "adam"}}
OTHERS = {"ect": [], "cd": ["target"], "ipfm": ["auxiliary", "auxiliary_optimizer"]}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Snapshots of denoisers, by D."""
    folder = tmp_path_factory.mktemp("teachers")
    return {D: write_snapshot(folder / f"{D}.pt", label_dim=0, dropout=0.2, augment=0.0,
                              **({} if math.isinf(D) else {"pfgmpp": True, "aug_dim": float(D)}))
            for D in DIMS}


def make_trainer(data, teacher, method, **options):
    opened = teacher if isinstance(teacher, Teacher) else Teacher.open(str(teacher))
    options = {"batch": BATCH, "lr": 1e-2, "lr_rampup": 0.0, "workers": 0, "dropout": 0.0,
               "method": method} | options
    config = DistillConfig(data=str(data), **opened.options | options)
    dataset = ImageFolderDataset(data, use_labels=config.cond)
    return Trainer(config, dataset, CPU, opened.weights, opened.build(CPU, "fp32"))


def started(*args, **options):
    trainer = make_trainer(*args, **options)
    trainer.start()
    return trainer


def moved(trainer, steps):
    for _ in range(steps):
        trainer.train_step()
    return trainer


def parts(state, method):
    return {name: digest(state[name])
            for name in ("net", "ema", "optimizer", "progress", *OTHERS[method])}


# ---- states, splits and ranks -------------------------------------------------------------------

@pytest.mark.parametrize("D", DIMS)
@pytest.mark.parametrize("method", METHODS)
def test_a_restored_state_goes_on_byte_by_byte(dataset_zip, teachers, method, D):
    given = dataset_zip, teachers[D], method
    whole = moved(started(*given, **OF_METHOD[method]), 2)
    half = copy.deepcopy(whole.state())
    moved(whole, 2)
    resumed = make_trainer(*given, **OF_METHOD[method])
    restore_(resumed, State("x.pt", half))
    resumed.start()
    moved(resumed, 2)
    assert parts(resumed.state(), method) == parts(whole.state(), method)
    # Each of them has moved, and is not that of the beginning.
    before = parts(half, method)
    assert all(before[name] != now for name, now in parts(whole.state(), method).items())
    assert whole.net.D == D and whole.loss_fn.kernel.D == D and whole.cur_nimg == 4 * BATCH


def gradients(trainer):
    """The gradients of the first step of each network that is trained."""
    batches = list(trainer._next_batches())
    auxiliary, found = trainer.objective.auxiliary, {}
    for number, part in enumerate(filter(None, (trainer._sampled, auxiliary))):
        trainer._accumulate_gradients(part, batches, number)
        found |= {(number, name): p.grad.clone() for name, p in part.net.named_parameters()
                  if p.grad is not None}
    return found


def assert_close(found, expected):
    """Equal but for float32 rounding, which is relative to the largest gradient of a tensor."""
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, msg=str(name),
                                   atol=1e-4 * float(grad.abs().max()) + 1e-5)


@pytest.mark.parametrize("method, D", PAIRS)
def test_rounds_and_ranks_change_only_rounding(dataset_zip, teachers, monkeypatch, method, D):
    given = dataset_zip, Teacher.open(str(teachers[D])), method
    options = OF_METHOD[method] | {"dropout": 0.0}
    whole = gradients(started(*given, **options))
    assert_close(gradients(started(*given, **options, batch_gpu=2)), whole)
    of_ranks = []
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        of_ranks.append(gradients(started(*given, **options)))
    # What DDP makes of them: their mean.
    assert_close({name: (of_ranks[0][name] + of_ranks[1][name]) / 2 for name in whole}, whole)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_that_are_computed_twice_keep_the_shared_masks(dataset_zip, teachers, method):
    plain, twice = (moved(started(dataset_zip, teachers[2], method, **OF_METHOD[method],
                                  checkpoint_blocks=value), 2) for value in (False, True))
    assert digest(dict(plain.net.state_dict())) == digest(dict(twice.net.state_dict()))


# ---- a step by hand -----------------------------------------------------------------------------

def first_images(trainer, step=0):
    config = trainer.config
    pixels, _ = trainer.dataset.get_batch(
        order_at(len(trainer.dataset), config.seed, step * BATCH + np.arange(BATCH)))
    return torch.from_numpy(pixels).float() / 127.5 - 1


def draws_of(trainer, step=0, *words):
    seed = misc.mix_seed(trainer.config.seed, 2, step, 0, *words)  # _STEP_TAG, the first block
    draws = trainer.loss_fn.draw((16, 3, 8, 8), torch.Generator().manual_seed(seed))
    return draws[:BATCH]


def noisy(y, draws, sigma):
    return y + (draws.z.double() * (sigma.double() * draws.scale).reshape(-1, 1, 1, 1)).float()


def step_by_hand(net, optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


def assert_moved_alike(found, expected, before, size):
    """Equal to a thousandth of the largest that a weight has moved by."""
    for name, p in found.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=0, atol=1e-3 * size, msg=name)
    assert any(not torch.equal(p.detach(), before[name])
               for name, p in found.named_parameters())


@pytest.mark.parametrize("D", DIMS)
def test_the_first_step_of_ect_is_radam_on_the_published_loss(dataset_zip, teachers, D):
    trainer = started(dataset_zip, teachers[D], "ect", lr=1e-4)
    net, before = copy.deepcopy(trainer.net), dict(trainer.net.state_dict())
    before = {name: p.clone() for name, p in before.items()}
    y, draws = first_images(trainer), draws_of(trainer)
    t = draws.sigma
    r = torch.clamp(t * (1 - (1 + 8 / (1 + torch.exp(t))) / 2), min=0)
    with torch.no_grad():
        target = net(noisy(y, draws, r), torch.where(r > 0, r, 1.0).reshape(-1, 1, 1, 1))
        target = torch.where((r > 0).reshape(-1, 1, 1, 1), target, y)
    gap = (net(noisy(y, draws, t), t.reshape(-1, 1, 1, 1)) - target).flatten(1).norm(dim=1)
    optimizer = torch.optim.RAdam(net.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
    expected = step_by_hand(net, optimizer, (gap / (t - r)).mean())
    trainer.train_step()
    size = max((p - before[name]).abs().max().item() for name, p in expected.items())
    assert_moved_alike(trainer.net, expected, before, size)
    assert (r == 0).any()
    average = {name: p for name, p in trainer.ema.named_parameters()}
    beta = 0.5 ** (BATCH / 0.887e6)  # without a ramp-up, for the weights begin as the teacher's
    for name, p in expected.items():
        torch.testing.assert_close(average[name], beta * before[name] + (1 - beta) * p, rtol=1e-5,
                                   atol=1e-7)


@pytest.mark.parametrize("D", DIMS)
@pytest.mark.parametrize("decay", [0.95, 0.0])
def test_cd_follows_the_teacher_and_its_target_the_network(dataset_zip, teachers, D, decay):
    trainer = started(dataset_zip, teachers[D], "cd", lr=1e-4, cd_scales=5, cd_decay=decay,
                      cd_metric="l2")
    net, teacher = copy.deepcopy(trainer.net), Teacher.open(str(teachers[D])).build(CPU, "fp32")
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    y, draws = first_images(trainer), draws_of(trainer)
    grid = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)]
    index = [min(range(5), key=lambda i: abs(grid[i] - s)) for s in draws.sigma.tolist()]
    assert max(index) < 4 and len(set(index)) > 1
    t, r = (torch.tensor([grid[i + k] for i in index]).reshape(-1, 1, 1, 1) for k in (0, 1))
    x = noisy(y, draws, t.flatten())
    with torch.no_grad():
        slope = (x - teacher(x, t)) / t
        guess = x + (r - t) * slope
        below = x + (r - t) * (slope + (guess - teacher(guess, r)) / r) / 2
        target = net(below, r)
    loss = (net(x, t) - target).square().sum(dim=(1, 2, 3)).mean()
    optimizer = torch.optim.RAdam(net.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
    expected = step_by_hand(net, optimizer, loss)
    trainer.train_step()
    size = max((p - before[name]).abs().max().item() for name, p in expected.items())
    assert_moved_alike(trainer.net, expected, before, size)
    # The lowest level is the boundary, where the network is the identity.
    assert trainer.net.boundary == 0.002 and torch.equal(trainer.net(y, grid[-1]), y)
    target = trainer.objective.other_networks.get("target")
    if not decay:
        assert target is None
        return
    averages = before
    for _ in range(3):
        averages = {name: decay * averages[name] + (1 - decay) * p.detach()
                    for name, p in trainer.net.named_parameters()}
        for name, p in target.named_parameters():
            torch.testing.assert_close(p, averages[name], rtol=1e-5, atol=1e-6)
        trainer.train_step()


@pytest.mark.parametrize("D", DIMS)
def test_a_step_of_ipfm_moves_the_auxiliary_and_then_the_generator(dataset_zip, teachers, D):
    options = {"optim": "adam", "lr": 1e-5, "aux_lr": 1e-3, "ipfm_steps": 2, "ipfm_alpha": 0.7}
    trainer = started(dataset_zip, teachers[D], "ipfm", **options)
    teacher = Teacher.open(str(teachers[D])).build(CPU, "fp32")
    S = copy.deepcopy(teacher).requires_grad_(True)
    G = copy.deepcopy(trainer.net)
    before = {name: p.detach().clone() for name, p in G.named_parameters()}
    labels = torch.zeros(BATCH, 0)

    def generated(draws):
        latents = (80 * draws.scale.reshape(-1, 1, 1, 1) * draws.z.double()).float()
        return G(latents, torch.full([BATCH], 80.0), labels)

    optimizer = torch.optim.Adam(S.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    for number in (1, 2):
        draws = draws_of(trainer, 0, number)
        with torch.no_grad():
            x = generated(draws)
        sigma = draws.noise.sigma.reshape(-1, 1, 1, 1)
        error = S(noisy(x, draws.noise, draws.noise.sigma), sigma) - x
        of_auxiliary = step_by_hand(
            S, optimizer, ((1 / sigma**2 + 4) * error**2).sum(dim=(1, 2, 3)).mean())
    S.requires_grad_(False)
    draws = draws_of(trainer, 0)
    x, sigma = generated(draws), draws.noise.sigma.reshape(-1, 1, 1, 1)
    state = noisy(x, draws.noise, draws.noise.sigma)
    T, gap = teacher(state, sigma), teacher(state, sigma) - S(state, sigma)
    w = 1 / (x - T).detach().abs().mean(dim=(1, 2, 3))
    loss = w * (gap * (T - x) - 0.7 * gap**2).sum(dim=(1, 2, 3))
    expected = step_by_hand(G, torch.optim.Adam(G.parameters(), lr=1e-5, betas=(0.0, 0.999)),
                            loss.mean())
    trainer.train_step()
    auxiliary = trainer.objective.auxiliary
    # Adam's steps have the length of the rate, and gradients near 0 the sign of their rounding.
    for net, weights, lr in ((auxiliary.net, of_auxiliary, 1e-3), (trainer.net, expected, 1e-5)):
        gaps = torch.cat([(p.detach() - weights[name]).abs().flatten()
                          for name, p in net.named_parameters()])
        assert (gaps < 0.02 * lr).float().mean() > 0.97
    assert any(not torch.equal(p, before[name]) for name, p in trainer.net.named_parameters())
    # Later steps: two of the auxiliary's for each of the generator's, and images are counted once.
    moved(trainer, 2)
    assert trainer.cur_nimg == 3 * BATCH
    for optimizer, steps, lr, first in ((auxiliary.optimizer, 6, 1e-3, 0.9),
                                        (trainer.optimizer, 3, 1e-5, 0.0)):
        assert {int(s["step"]) for s in optimizer.state.values()} == {steps}
        [group] = optimizer.param_groups
        assert (group["lr"], group["betas"]) == (lr, (first, 0.999))
    assert not auxiliary.net.training and trainer.net.training


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_auxiliarys_rate_rises_in_as_many_steps_as_the_generators(dataset_zip, teachers, steps):
    trainer = started(dataset_zip, teachers[INF], "ipfm", optim="adam", lr=1e-5, aux_lr=1e-3,
                      lr_rampup=80e-6, ipfm_steps=steps)
    moved(trainer, 2)  # the second one after 8 of 80 images, or of 80 / steps
    auxiliary = trainer.objective.auxiliary
    assert auxiliary.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * steps / 10)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5 / 10)


def test_the_auxiliarys_rate_falls_with_the_generators(dataset_zip, teachers):
    trainer = started(dataset_zip, teachers[INF], "ipfm", optim="adam", lr=1e-5, aux_lr=1e-3,
                      lr_decay="cosine", duration=32e-6)
    moved(trainer, 3)  # the third one at half of the run
    auxiliary = trainer.objective.auxiliary
    assert auxiliary.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 2)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5 / 2)


def test_no_two_steps_of_the_auxiliary_draw_alike(dataset_zip, teachers):
    trainer, seen = started(dataset_zip, teachers[2], "ipfm", **OF_METHOD["ipfm"]), []
    draw = trainer._draw
    trainer._draw = lambda *args: (seen.append(draw(*args)), seen[-1])[1]
    moved(trainer, 2)
    assert len(seen) == 2 * 3
    for a, b in itertools.combinations(seen, 2):
        assert not (a.z[0] == b.z[0]).any() and not (a.noise.z[0] == b.noise.z[0]).any()
        assert a.scale[0] != b.scale[0] and a.noise.sigma[0] != b.noise.sigma[0]


def test_the_stage_of_ect_follows_the_images_of_the_run(dataset_zip, teachers):
    trainer, seen = started(dataset_zip, teachers[2], "ect", ect_double=16e-6), []
    lower = trainer.loss_fn.lower_level
    trainer.loss_fn.lower_level = lambda t, nimg: (seen.append(trainer.loss_fn.stage(nimg)),
                                                   lower(t, nimg))[1]
    moved(trainer, 5)
    assert seen == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("optim", ["radam", "adam"])
def test_a_loss_scale_does_not_change_the_first_steps(dataset_zip, teachers, optim):
    plain, scaled = (moved(started(dataset_zip, teachers[INF], "ect", lr=1e-4, ls=ls, optim=optim),
                           2) for ls in (1.0, 64.0))
    before = Teacher.open(str(teachers[INF])).weights
    gaps, steps = (torch.cat([(p - other[name]).abs().flatten()
                              for name, p in plain.net.state_dict().items()])
                   for other in (scaled.net.state_dict(), before))
    assert gaps.median() < 1e-3 * steps.median() != 0


def test_moments_of_radam_are_resumed_as_they_are_at_another_scale(dataset_zip, teachers):
    given = dataset_zip, teachers[INF], "ect"
    state = copy.deepcopy(moved(started(*given, ls=8.0), 2).state())
    resumed = make_trainer(*given, ls=2.0)
    restore_(resumed, State("x.pt", state))
    assert digest(resumed.optimizer.state_dict()["state"]) == digest(state["optimizer"]["state"])


# ---- steps that are not finite ------------------------------------------------------------------

@pytest.mark.parametrize("optim", ["radam", "adam"])
@pytest.mark.parametrize("method", METHODS)
def test_a_bad_step_leaves_everything_as_it_was(dataset_zip, teachers, method, optim):
    trainer = moved(started(dataset_zip, teachers[64], method,
                            **OF_METHOD[method] | {"optim": optim}), 1)
    names = [name for name in ("net", "ema", "optimizer", *OTHERS[method])]

    def now():
        state = trainer.state()
        return {name: digest({"x": state[name]["state"] if "optimizer" in name else state[name]})
                for name in names}

    before, broken = now(), [(name, getattr(trainer.objective, name))
                             for name in ("loss", "auxiliary_loss")]
    for name, loss in broken:
        setattr(trainer.objective, name, lambda *args, loss=loss: loss(*args) * math.nan)
    trainer.train_step()
    assert now() == before
    assert trainer.counters["bad_total"] == 1 and trainer.cur_nimg == 2 * BATCH
    for name, loss in broken:
        setattr(trainer.objective, name, loss)
    trainer.train_step()
    assert trainer.counters["bad_total"] == 1
    assert all(now()[name] != old for name, old in before.items())


def test_a_bad_step_of_the_auxiliary_alone_is_counted(dataset_zip, teachers):
    trainer = started(dataset_zip, teachers[64], "ipfm", **OF_METHOD["ipfm"])
    loss = trainer.objective.auxiliary_loss
    trainer.objective.auxiliary_loss = lambda *args: loss(*args) * math.nan
    before = digest(dict(trainer.objective.auxiliary.net.state_dict()))
    trainer.train_step()
    assert trainer.counters["bad_total"] == 1
    assert digest(dict(trainer.objective.auxiliary.net.state_dict())) == before


# ---- files --------------------------------------------------------------------------------------

def command(data, outdir, teacher, method, *more, steps=4):
    own = {"ect": [], "cd": ["--cd-scales=6"], "ipfm": ["--ipfm-steps=2"]}[method]
    return [f"--method={method}", f"--teacher={teacher}", f"--data={data}", f"--outdir={outdir}",
            "--name=run", "--batch=8", "--lr=1e-3", "--lr-rampup=0", "--workers=0", "--seed=3",
            "--samples=0", "--tick=0.008", "--dump=1", "--snap=1", "--device=cpu",
            f"--duration={steps * 8e-6}", *own, *more]


def newest(run_dir, kind="training-state"):
    return sorted(run_dir.glob(f"{kind}-*.pt"))[-1]


def error_of(result, code):
    """Returns the one line of a command that ends in `code`."""
    assert result.exit_code == code, result.output
    [line] = [text for text in result.output.splitlines() if text.startswith("Error: ")]
    assert "Traceback" not in result.output
    return line


@pytest.fixture(scope="module")
def run_of(dataset_zip, teachers, tmp_path_factory):
    """Returns a function from a method to the directory of its run of four steps."""
    @functools.cache
    def run(method):
        outdir = tmp_path_factory.mktemp(method)
        result = CliRunner().invoke(distill.main, command(
            dataset_zip, outdir, teachers[dict(PAIRS)[method]], method))
        assert result.exit_code == 0, result.output
        return outdir / "run"
    return run


@pytest.mark.parametrize("method, D", FIRST_PAIR)
def test_a_resumed_run_writes_the_state_of_an_undisturbed_one(dataset_zip, teachers, run_of, invoke,
                                                              tmp_path, method, D):
    half = command(dataset_zip, tmp_path, teachers[D], method, steps=2)
    assert invoke(distill.main, *half).exit_code == 0
    moved_away = shutil.copy(teachers[D], tmp_path / "moved.pt")
    result = invoke(distill.main, *command(dataset_zip, tmp_path, moved_away, method),
                    "--resume=auto")
    assert result.exit_code == 0 and "Resuming from" in result.output, result.output
    assert parts(load(newest(tmp_path / "run")), method) == parts(load(newest(run_of(method))),
                                                                  method)


@pytest.mark.parametrize("method, D", PAIRS)
def test_a_snapshot_samples_in_a_few_steps_with_no_more_flags(run_of, invoke, tmp_path, method, D):
    snapshot = newest(run_of(method), "network-snapshot")
    content = load(snapshot)
    network = content["network"]
    assert not {"net", "optimizer", "teacher", *OTHERS[method]} & set(content)
    levels = {"ect": [80, 0.821], "cd": [80, 0.821], "ipfm": [80]}[method]
    assert network["few_step"] == {"method": method, "levels": levels}
    assert network.get("D", INF) == D and network["pfgmpp"] == (D < INF)
    assert network.get("boundary") == (0.002 if method == "cd" else None)
    result = invoke(generate.main, f"--network={snapshot}", f"--outdir={tmp_path}", "--steps=1,2",
                    "--seeds=0-3", "--device=cpu")
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.rglob("*.png"))) == 2 * 4
    result = invoke(generate.main, f"--network={snapshot}", f"--outdir={tmp_path}",
                    "--seeds=0-3", "--device=cpu", "--solver=heun")
    assert "few-step network" in error_of(result, 2)


def test_no_likelihood_follows_from_a_few_step_network(dataset_zip, run_of, invoke, tmp_path):
    result = invoke(likelihood.main, f"--network={newest(run_of('ect'), 'network-snapshot')}",
                    f"--data={dataset_zip}", "--device=cpu", f"--out={tmp_path / 'x.jsonl'}")
    assert "a few-step network (ect), which defines no density" in error_of(result, 2)
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize("method", ["ect", "none"])
def test_a_consistency_function_from_scratch_and_from_a_teacher_begin_where_they_should(
        dataset_zip, teachers, invoke, tmp_path, method):
    words = command(dataset_zip, tmp_path, "none" if method == "none" else teachers[64], "ect",
                    "--dry-run", *(TINY_NETWORK if method == "none" else []))
    result = invoke(distill.main, *words)
    assert result.exit_code == 0, result.output
    options = options_of(result)
    network = options.pop("network")
    assert options["teacher"] == (None if method == "none" else str(teachers[64]))
    assert options.get("aug_dim") == (None if method == "none" else 64)
    assert options.get("arch") == ("ncsnpp" if method == "none" else None)
    assert network["embedding_type"] == "fourier" and network.get("D") == options.get("aug_dim")
    assert not (tmp_path / "run").exists()


def options_of(result):
    """Returns the options that a dry run prints."""
    assert result.exit_code == 0, result.output
    return json.loads(result.output[result.output.index("{"):result.output.rindex("}") + 1])


@pytest.mark.parametrize("precond", ["edm", "ve"])
@pytest.mark.parametrize("method, own, levels", [
    ("ect", {"boundary": 0.0, "eval_steps": 2, "P_std": 2.0, "ect_double": 3.2}, [80, 0.821]),
    ("cd", {"boundary": 0.002, "eval_steps": 2, "cd_scales": 6}, [80, 0.821]),
    ("ipfm", {"boundary": 0.0, "eval_steps": 1, "P_std": 1.2, "sigma_init": 80.0, "aux_lr": 1e-3},
     [80])])
def test_a_dry_run_prints_what_is_in_use_and_nothing_else(dataset_zip, invoke, tmp_path, method,
                                                          own, levels, precond):
    teacher = write_snapshot(tmp_path / "teacher.pt", label_dim=0, augment=0.0, precond=precond)
    args = command(dataset_zip, tmp_path, teacher, method, "--dry-run")
    options = options_of(invoke(distill.main, *args))
    if precond == "ve":  # which has no boundary
        own = {name: value for name, value in own.items() if name != "boundary"}
    assert {name: options[name] for name in own} == own
    network = options.pop("network")
    assert network["few_step"] == {"method": method, "levels": levels}
    assert network.get("boundary", 0) == own.get("boundary", 0)
    of_methods = {"ect_q", "ect_k", "ect_b", "ect_c", "ect_double", "cd_scales", "cd_metric",
                  "cd_decay", "ipfm_alpha", "ipfm_steps", "aux_lr", "sigma_init"}
    assert {name.split("_")[0] for name in of_methods & options.keys()} == {
        "ect": {"ect"}, "cd": {"cd"}, "ipfm": {"ipfm", "aux", "sigma"}}[method]
    assert ("P_mean" in options) == (method != "cd") and ("boundary" in options) == (
        precond == "edm")
    assert not {"arch", "precond", "cbase", "sigma_data", "stf", "rbatch", "augment", "transfer",
                "val_data", "eval_solver", "teacher_network", "eval_num"} & options.keys()
    assert options.keys() <= {field.name for field in dataclasses.fields(DistillConfig)}


@pytest.mark.parametrize("precond", ["edm", "vp", "ve"])
def test_every_preconditioner_is_trained_from_scratch_at_the_levels_of_ect(dataset_zip, precond):
    config = DistillConfig(data=str(dataset_zip), arch="ncsnpp", cbase=8, cres=(1, 2), nblock=1,
                           batch=BATCH, lr=1e-4, workers=0, precond=precond, pfgmpp=True,
                           aug_dim=2.0, dropout=0.0)
    trainer = Trainer(config, ImageFolderDataset(dataset_zip), CPU)
    trainer.start()
    before = digest(dict(trainer.net.state_dict()))
    moved(trainer, 2)
    assert digest(dict(trainer.net.state_dict())) != before and not trainer.counters["bad_total"]
    assert trainer.net.few_step.levels == (80, 0.821) and trainer.net.D == 2
    levels = trainer.loss_fn.draw((10_000, 1), torch.Generator().manual_seed(0)).sigma.log()
    # ln t ~ Normal(-1.1, 2): five standard errors of the mean, and of the deviation.
    assert abs(levels.mean() + 1.1) < 5 * 2 / 100 and abs(levels.std() - 2) < 5 * 2 / 141


@pytest.mark.scripts
@pytest.mark.parametrize("method, D", FIRST_PAIR)
def test_two_ranks_train_what_one_does(dataset_zip, teachers, invoke, tmp_path, method, D):
    args = ["--dropout=0", "--lr=1e-5"]

    def losses(name):
        lines = (tmp_path / name / "run/stats.jsonl").read_text().splitlines()
        return [json.loads(line)["Loss/loss"]["mean"] for line in lines]

    one = command(dataset_zip, tmp_path / "one", teachers[D], method, *args)
    assert invoke(distill.main, *one).exit_code == 0
    run_script("distill.py", *command(dataset_zip, tmp_path / "two", teachers[D], method, *args),
               processes=2)
    assert losses("two") == pytest.approx(losses("one"), rel=1e-3)
    assert losses("two")[0] == pytest.approx(losses("one")[0], rel=1e-5)


# ---- refusals -----------------------------------------------------------------------------------

def iddpm_snapshot(path):
    network = {"class_name": "iDDPMPrecond", "img_resolution": 8, "img_channels": 3,
               "model_type": "DhariwalUNet", "model_channels": 64, "channel_mult": [1],
               "num_blocks": 1, "attn_resolutions": [], "M": 100}
    from pfgmpp.networks import build_network
    net = build_network(network)
    checkpoint.save(path, {
        "format": checkpoint.SNAPSHOT_FORMAT, "network": net.config, "ema": dict(net.state_dict()),
        "progress": {"cur_nimg": 0}, "options": TrainConfig(data="none").to_dict()})
    return path


@pytest.mark.parametrize("more, words", [
    (["--arch=adm"], "--arch with --teacher="),
    (["--cbase=8"], "--cbase with --teacher="), (["--cond=1"], "--cond with --teacher="),
    (["--precond=vp"], "--precond with --teacher="), (["--aug_dim=0"], "--aug_dim=0"),
    (["--ect-q=1"], "--ect-q=1: must be above 1"), (["--boundary=-1"], "--boundary=-1"),
    (["--method=cd", "--cd-scales=1"], "--cd-scales=1: must be 2 to 10000"),
    (["--method=cd", "--cd-scales=100000000000"], "must be 2 to 10000"),
    (["--method=cd", "--boundary=0.01"], "must be at most 0.002, the lowest level of the grid"),
    (["--boundary=100"], "must be at most 0.4105, half the lowest sampling level"),
    (["--method=ipfm", "--boundary=30", "--eval-steps=4"],
     "--eval-steps=4: sampling uses noise levels 80 to 20.0015, but the network returns its input "
     "at 30"),
    (["--ect-q=inf"], "--ect-q=inf: must be above 1, and finite"),
    (["--eval-steps=65"], "--eval-steps=65: must be at most 64"), (["--teacher="], "--teacher=:"),
    (["--method=ipfm", "--sigma-init=0.002"], "--sigma-init=0.002: must be above 0.002"),
    (["--method=ipfm", "--sigma-init=1e30"], "at most 1e+06"),
    (["--method=cd", "--cd-decay=1"], "--cd-decay=1"),
    (["--method=ipfm", "--precision=fp16"], "--precision=fp16 with --method=ipfm"),
    (["--method=ipfm", "--sigma-init=0"], "--sigma-init=0"),
    (["--method=cd", "--preset=cifar10-ect"], "--preset=cifar10-ect is for --method=ect"),
    (["--batch=7", "--batch-gpu=2"], "--batch-gpu=2 must divide")], ids=str)
def test_flags_that_do_not_fit_are_refused(dataset_zip, teachers, invoke, tmp_path, more, words):
    result = invoke(distill.main, *command(dataset_zip, tmp_path, teachers[64], "ect", *more))
    assert words in error_of(result, 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag, D", [("--aug_dim=128", "128"), ("--pfgmpp=0", "inf")])
def test_another_D_than_the_teachers_is_refused(dataset_zip, teachers, invoke, tmp_path, flag, D):
    result = invoke(distill.main, *command(dataset_zip, tmp_path, teachers[64], "ect", flag))
    line = error_of(result, 1)
    assert f"D = {D}, but" in line and "was trained with D = 64" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["cd", "ipfm"])
def test_distillation_without_a_teacher_is_refused(dataset_zip, invoke, tmp_path, method):
    result = invoke(distill.main, *command(dataset_zip, tmp_path, "none", method))
    assert f"--teacher=none with --method={method}" in error_of(result, 2)


def test_networks_that_can_not_teach_are_refused(dataset_zip, run_of, invoke, tmp_path):
    few = newest(run_of("ect"), "network-snapshot")
    for teacher, words, code in ((few, "is a few-step network, which can't be a teacher", 1),
                                 (iddpm_snapshot(tmp_path / "i.pt"), "discrete noise levels", 2),
                                 (tmp_path / "nothing.pt", "nothing.pt", 1)):
        result = invoke(distill.main, *command(dataset_zip, tmp_path, teacher, "ect"))
        assert words in error_of(result, code)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("data, words", [
    ({"side": 16}, "images are 3x16x16 (channels x height x width), but the teacher makes 3x8x8"),
    ({"channels": 1}, "images are 1x8x8")], ids=str)
def test_data_of_another_shape_are_refused(teachers, invoke, tmp_path, data, words):
    path = write_dataset(tmp_path / "data.zip", num=8, **data)
    result = invoke(distill.main, *command(path, tmp_path, teachers[2], "ect"))
    assert words in error_of(result, 1)


@pytest.mark.parametrize("classes, words, code", [(0, "has no labels", 2), (3, "labels of 3", 1)])
def test_data_of_other_labels_are_refused(invoke, tmp_path, classes, words, code):
    teacher = write_snapshot(tmp_path / "teacher.pt", label_dim=2, cond=True)
    path = write_dataset(tmp_path / "data.zip", num=12, classes=classes)
    result = invoke(distill.main, *command(path, tmp_path, teacher, "ect"))
    assert words in error_of(result, code)


# A network as published is of 0 to inf (edm), 0.02 to 100 (ve), 0.00098 to 152.167 (vp).
@pytest.mark.parametrize("precond, network, more, words", [
    ("vp", {}, ["--method=ipfm", "--sigma-init=1000"],
     "--sigma-init=1000: sampling uses noise levels 1000, but the network knows levels from 152.1"),
    ("ve", {}, ["--method=ipfm", "--sigma-init=0.01"], "sampling uses noise levels 0.01, but"),
    ("ve", {"sigma_min": 0.9}, [], "uses noise levels 80 to 0.821, but the network knows"),
    ("edm", {"sigma_min": 0.05}, ["--eval-steps=64"], "sampling uses noise levels 80 to 0.009"),
    ("edm", {"sigma_min": 0.05}, ["--method=cd", "--boundary=0.06"], "must be at most 0.05, the")],
    ids=str)
@pytest.mark.parametrize("dry_run", [True, False])
def test_levels_that_could_not_be_sampled_are_refused_before_the_start(
        dataset_zip, invoke, tmp_path, precond, network, more, words, dry_run):
    teacher = with_network(write_snapshot(tmp_path / "teacher.pt", label_dim=0, augment=0.0,
                                          precond=precond), **network)
    result = invoke(distill.main, *command(dataset_zip, tmp_path, teacher, "ect", *more),
                    *(["--dry-run"] if dry_run else []))
    assert words in error_of(result, 2)
    assert not (tmp_path / "run").exists() and "Parameters" not in result.output


@pytest.mark.parametrize("method", METHODS)
def test_sampling_starts_at_the_highest_level_that_the_teacher_knows(dataset_zip, tmp_path, method):
    teacher = with_network(write_snapshot(tmp_path / "teacher.pt", label_dim=0, augment=0.0,
                                          precond="ve"), sigma_max=50.0)
    trainer = started(dataset_zip, teacher, method, **OF_METHOD[method])
    assert trainer.net.few_step.levels[0] == 50
    sample_grids.sampler_of(trainer.config).check(trainer.net)
    if method == "cd":
        assert trainer.loss_fn.levels[0] == 50
    if method == "ipfm":
        assert trainer.loss_fn.sigma_init == 50
    moved(trainer, 1)
    assert trainer.counters["bad_total"] == 0


@pytest.mark.parametrize("precond, network, low, boundary", [
    ("edm", {"sigma_min": 0.05}, 0.05, 0.05), ("edm", {}, 0.002, 0.002), ("ve", {}, 0.02, 0)])
def test_cds_function_is_the_identity_at_the_lowest_level_of_its_grid(
        dataset_zip, tmp_path, precond, network, low, boundary):
    teacher = with_network(write_snapshot(tmp_path / "teacher.pt", label_dim=0, augment=0.0,
                                          precond=precond), **network)
    trainer = started(dataset_zip, teacher, "cd", **OF_METHOD["cd"])
    assert trainer.loss_fn.levels[-1].item() == pytest.approx(low, rel=1e-7)
    assert getattr(trainer.net, "boundary", 0) == boundary == trainer.config.used_boundary
    x = first_images(trainer)
    if boundary:
        assert torch.equal(trainer.net(x, trainer.loss_fn.levels[-1]), x)


def test_ect_is_trained_from_the_boundary_of_its_network_on(dataset_zip, teachers):
    trainer = started(dataset_zip, teachers[2], "ect", boundary=0.4)
    assert trainer.loss_fn.boundary == trainer.net.boundary == 0.4
    assert trainer.loss_fn.lower_level(torch.tensor([0.5, 80.0]), 0).tolist() == [
        pytest.approx(0.4), 40]


def test_classes_beyond_the_teachers_can_be_chosen(invoke, tmp_path):
    teacher = write_snapshot(tmp_path / "teacher.pt", label_dim=2, cond=True)
    path = write_dataset(tmp_path / "data.zip", num=12, classes=3)
    result = invoke(distill.main, *command(path, tmp_path, teacher, "ect"))
    assert "choose its classes with dataset_tool.py --classes" in error_of(result, 1)


@pytest.mark.parametrize("of_teacher, vectors, is_fine", [
    ("classes", False, True), ("vectors", True, True), ("classes", True, False),
    (None, False, True), (None, True, False), ("vectors", False, False)])
def test_labels_of_the_teachers_width_must_be_of_its_kind_too(invoke, tmp_path, of_teacher, vectors,
                                                              is_fine):
    teacher = write_snapshot(tmp_path / "teacher.pt", label_dim=3, cond=True,
                             dataset={"label_kind": of_teacher} if of_teacher else None)
    path = write_dataset(tmp_path / "data.zip", num=12, classes=3, vectors=vectors)
    result = invoke(distill.main, *command(path, tmp_path, teacher, "ect", "--dry-run"))
    if is_fine:
        assert result.exit_code == 0 and "Warning" not in result.output, result.output
    else:
        given = "vectors" if vectors else "classes"
        assert f"its labels are {given}, but the teacher was trained on" in error_of(result, 1)


@pytest.mark.parametrize("of_teacher, is_warned", [
    (None, False), (["cats", "dogs"], False), (["dogs", "cats"], True), (["cats"], False)])
def test_classes_of_other_names_are_warned_of(invoke, tmp_path, of_teacher, is_warned):
    names = {"class_names": of_teacher} if of_teacher else {}
    teacher = write_snapshot(tmp_path / "teacher.pt", label_dim=2, cond=True,
                             dataset={"label_kind": "classes", **names})
    for kind in ("cats", "dogs"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        PIL.Image.new("RGB", (8, 8), "teal").save(tmp_path / "photos" / kind / "0.png")
    assert invoke(dataset_tool.main, f"--source={tmp_path / 'photos'}", "--workers=1",
                  f"--dest={tmp_path / 'data.zip'}").exit_code == 0
    result = invoke(distill.main, *command(tmp_path / "data.zip", tmp_path, teacher, "ect",
                                           "--dry-run", "--batch=2"))
    assert result.exit_code == 0, result.output
    assert ("class 0 is called 'cats', but 'dogs' in the data of" in result.output) == is_warned


def test_a_state_is_resumed_by_the_command_that_wrote_it(dataset_zip, teachers, run_of, invoke,
                                                         tmp_path):
    state = newest(run_of("cd"))
    plain = [f"--data={dataset_zip}", f"--outdir={tmp_path}", "--name=run", *TINY_NETWORK,
             "--batch=8", "--workers=0", "--samples=0", "--device=cpu", "--duration=0.000008",
             "--tick=0.008", "--dump=1"]
    result = invoke(train.main, *plain, f"--resume={state}")
    assert "was written by distill.py --method=cd" in error_of(result, 2)
    assert invoke(train.main, *plain, "--seed=3").exit_code == 0
    result = invoke(distill.main, *command(dataset_zip, tmp_path / "x", teachers[INF], "ect"),
                    f"--resume={newest(tmp_path / 'run')}")
    assert "was written by train.py" in error_of(result, 2)


@pytest.mark.parametrize("more, words", [
    (["--method=cd"], "--method=cd"), (["--ect-q=3"], "--ect-q=3"), (["--optim=adam"], "--optim"),
    (["--P_mean=-1.2"], "--P_mean=-1.2"), (["--dropout=0.1"], "--dropout=0.1")], ids=str)
def test_other_options_are_refused_on_resuming(dataset_zip, teachers, run_of, invoke, tmp_path,
                                               more, words):
    result = invoke(distill.main, *command(dataset_zip, tmp_path, teachers[2], "ect", steps=6),
                    *more, f"--resume={newest(run_of('ect'))}")
    line = error_of(result, 2)
    assert words in line and "in the state" in line


def test_a_default_that_was_typed_is_not_called_one(dataset_zip, teachers, run_of, invoke,
                                                     tmp_path):
    state = newest(run_of("ect"))  # made with --lr=1e-3
    args = [arg for arg in command(dataset_zip, tmp_path, teachers[2], "ect", steps=6)
            if not arg.startswith("--lr=")]
    for typed, words in ((["--lr=1e-4"], "--lr=0.0001 (0.001"), ([], "--lr=0.0001, the default (")):
        result = invoke(distill.main, *args, *typed, f"--resume={state}")
        assert words in error_of(result, 2)


def test_options_of_other_methods_may_differ_on_resuming():
    then = DistillConfig(data="a", method="ect")
    now = dataclasses.replace(then, cd_scales=9, aux_lr=1.0)
    assert changed_options(now, then.to_dict()) == []
    assert changed_options(dataclasses.replace(now, ect_q=3.0), then.to_dict()) == [
        "--ect-q=3 (2 in the state)"]


@pytest.mark.parametrize("method, flag", [
    ("ect", "--cd-scales=7"), ("cd", "--ect-q=4"), ("ipfm", "--ect-c=3"), ("ect", "--sigma-init=5"),
    ("cd", "--P_mean=0"), ("cd", "--ipfm-steps=2"), ("ipfm", "--cd-decay=0")])
def test_flags_of_other_methods_are_refused(dataset_zip, invoke, tmp_path, method, flag):
    args = [arg for arg in command(dataset_zip, tmp_path, "none", method) if "scales" not in arg]
    result = invoke(distill.main, *args, flag)
    assert f"{flag.split('=')[0]} with --method={method}: has no effect" in error_of(result, 2)


def test_defaults_are_called_so_where_nobody_typed_them_and_left_out_where_the_method_is_to_blame():
    then = DistillConfig(data="a", method="ipfm", teacher="t", **METHOD_DEFAULTS["ipfm"]).to_dict()
    now = DistillConfig(data="a", method="ect", **METHOD_DEFAULTS["ect"])
    assert changed_options(now, then) == ["--method=ect, the default (ipfm in the state)"]
    assert changed_options(now, then, {"method", "lr"}) == [
        "--lr=0.0001 (1e-05 in the state)", "--method=ect (ipfm in the state)"]
    # Of one method they are named, whatever its name is.
    other = then | {"lr": 0.5}
    again = DistillConfig(data="a", method="ipfm", teacher="t", **METHOD_DEFAULTS["ipfm"])
    assert changed_options(again, other) == ["--lr=1e-05, the default (0.5 in the state)"]
    # What the method does not decide is named too.
    assert "--clip-grad=none (1 in the state)" in changed_options(now, then | {"clip_grad": 1.0})


@pytest.mark.parametrize("before, after", [("radam", "adam"), ("adam", "radam")])
def test_moments_are_taken_over_by_another_optimizer(dataset_zip, teachers, before, after):
    given = dataset_zip, teachers[2], "ect"
    state = moved(started(*given, optim=before), 1).state()
    trainer = make_trainer(*given, optim=after)
    restore_(trainer, State("x.pt", copy.deepcopy(state)))
    trainer.start()
    moments = [m["exp_avg"] for m in trainer.optimizer.state_dict()["state"].values()]
    then = [m["exp_avg"] for m in state["optimizer"]["state"].values()]
    assert all(map(torch.equal, moments, then)) and trainer.optimizer.defaults.get(
        "fused", False) is (after == "adam")
    moved(trainer, 1)  # with groups of its own kind
    assert trainer.counters["bad_total"] == 0


def test_a_target_that_the_state_lacks_begins_with_the_network(dataset_zip, teachers):
    given = dataset_zip, teachers[64], "cd"
    state = moved(started(*given, cd_scales=6, cd_decay=0.0), 2).state()
    assert "target" not in state
    trainer = make_trainer(*given, cd_scales=6, cd_decay=0.9)
    restore_(trainer, State("x.pt", copy.deepcopy(state)))
    assert digest(trainer.objective.state()["target"]) == digest(state["net"])


def test_every_option_of_few_steps_is_free_or_compared_or_in_the_network():
    names = {field.name for field in dataclasses.fields(DistillConfig)}
    new = names - {field.name for field in dataclasses.fields(TrainConfig)}
    assert names >= RESUME_MAY_CHANGE.keys() | NETWORK_OPTIONS
    assert new & RESUME_MAY_CHANGE.keys() == {"teacher"}  # its weights are compared
    assert new & NETWORK_OPTIONS == {"boundary", "sigma_init", "teacher_network"}
    assert new - RESUME_MAY_CHANGE.keys() - NETWORK_OPTIONS == {
        "method", "optim", "teacher_sha256", "ect_q", "ect_k", "ect_b", "ect_c", "ect_double",
        "cd_scales", "cd_metric", "cd_decay", "ipfm_alpha", "ipfm_steps", "aux_lr"}


@pytest.mark.parametrize("more, words", [
    (["--method=ipfm", "--optim=adam", "--sigma-init=40"], "few_step"),
    (["--method=cd", "--boundary=0.001"], "boundary")], ids=str)
def test_what_the_network_records_is_compared_on_resuming(dataset_zip, teachers, run_of, invoke,
                                                          tmp_path, more, words):
    method = more[0].removeprefix("--method=")
    teacher = teachers[dict(PAIRS)[method]]
    result = invoke(distill.main, *command(dataset_zip, tmp_path, teacher, method, steps=6),
                    *more, f"--resume={newest(run_of(method))}")
    assert words in error_of(result, 1)


def test_another_teacher_is_refused_on_resuming(dataset_zip, run_of, invoke, tmp_path):
    other = write_snapshot(tmp_path / "other.pt", label_dim=0, dropout=0.2, augment=0.0, seed=1,
                           pfgmpp=True, aug_dim=2.0)
    result = invoke(distill.main, *command(dataset_zip, tmp_path, other, "ect", steps=6),
                    f"--resume={newest(run_of('ect'))}")
    assert "other.pt (other weights in the state)" in error_of(result, 2)


def test_what_stands_in_two_places_for_want_of_pytorch_is_alike():
    assert distill_config.METHODS == few_steps.METHODS == tuple(METHOD_DEFAULTS)
    assert sweeps.CONSISTENCY == samplers.CONSISTENCY
    assert (distill_config._LOWEST_LEVEL, sweeps.MAX_FEW_STEPS) == (
        few_steps._LOWEST, few_steps._MAX_LEVELS)
    assert distill_config._HIGHEST_LEVEL == schedules._HIGHEST_GIVEN


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_counts_the_operations_of_a_step(dataset_zip, teachers, method, twice):
    trainer = started(dataset_zip, teachers[64], method, **OF_METHOD[method],
                      checkpoint_blocks=twice)
    with FlopCounterMode(display=False) as counter:
        trainer.train_step()
    found = Estimate.of_network(trainer.net.config, checkpoint_blocks=twice)
    expected = estimate._with_method(found, trainer.config).training_flops
    assert counter.get_total_flops() / BATCH == pytest.approx(expected, rel=0.03)


def kept_bytes(trainer):
    """The most bytes that autograd keeps at once in the generator's part of a step."""
    known = {p.untyped_storage().data_ptr() for net in (
        trainer.net, *trainer.objective.other_networks.values()) for p in net.parameters()}
    kept = {}

    def add(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = tensor
        return tensor

    batches = list(trainer._next_batches())
    with torch.autograd.graph.saved_tensors_hooks(add, lambda tensor: tensor):
        trainer._accumulate_gradients(trainer._sampled, batches)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_counts_the_tensors_that_a_step_keeps(dataset_zip, teachers, invoke, tmp_path,
                                                        method):
    few, many = (kept_bytes(started(dataset_zip, teachers[64], method, batch=batch,
                                    **OF_METHOD[method])) for batch in (8, 40))
    args = command(dataset_zip, tmp_path, teachers[64], method, "--dry-run",
                   f"--dropout={OF_METHOD[method].get('dropout', 0)}")
    [told] = re.findall(r"8 x ([\d.]+) kB per image", invoke(distill.main, *args).output)
    assert float(told) * 1e3 == pytest.approx((many - few) / 32, rel=0.05)


def test_with_checkpoints_all_three_networks_of_ipfm_keep_the_inputs_of_blocks(dataset_zip,
                                                                               teachers):
    few, many = (kept_bytes(started(dataset_zip, teachers[64], "ipfm", **OF_METHOD["ipfm"],
                                    batch=batch, checkpoint_blocks=True)) for batch in (8, 40))
    network = started(dataset_zip, teachers[64], "ipfm").net.config
    # The largest block, which it adds once, is computed later.
    one, three = (Estimate.of_network(network, checkpoint_blocks=True, differentiated=number)
                  for number in (1, 3))
    assert 1.5 * (three.image_bytes - one.image_bytes) == pytest.approx((many - few) / 32, rel=0.1)


def test_scripts_of_denoisers_know_a_few_step_run(dataset_zip, run_of, invoke, tmp_path):
    run = run_of("cd")
    result = invoke(train.main, f"--config={run / 'training_options.json'}", "--data=x.zip",
                    f"--outdir={tmp_path}")
    assert "options of distill.py" in error_of(result, 2)
    shown = RunRecord.read(run).settings
    assert shown["method"] == "cd" and shown["teacher"].endswith(".pt")
    assert not {"architecture", "preconditioning"} & shown.keys()  # which the teacher decides
    result = invoke(sweep.main, f"--runs={run}", f"--ref={dataset_zip}", "--detector=pixels",
                    f"--outdir={tmp_path}", "--alpha=0.1")
    assert "--alpha: " in error_of(result, 2) and not list(tmp_path.iterdir())
    for flag, words in (("--disc=vp", "--disc=vp"), ("--sigmas=80,0.001", "boundary")):
        result = invoke(generate.main, f"--network={run}", f"--outdir={tmp_path / 'out'}", flag)
        assert words in error_of(result, 2 if "disc" in flag else 1)
