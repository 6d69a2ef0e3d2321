"""What a run starts from: states of this and other projects, and weights that fit in part."""

import copy
import json
import re

import pytest
import torch
from pickle_assembler import CONTAINERS
from published_files import optimizer_state, stored
from snapshots import write_snapshot
from tiny import TINY_RUN, write_dataset

import train
from checkpoints import checkpoint
from images.dataset import ImageFolderDataset
from pfgmpp.networks import build_network
from sampling.network_sampler import NetworkSampler
from training.config import TrainConfig
from training.resume import (
    State,
    changed_options,
    open_weights,
    read_state,
    restore_,
    settle_options,
)
from training.trainer import DRAWS_VERSION, Trainer

CPU = torch.device("cpu")
SMALL = {"arch": "ncsnpp", "cbase": 8, "cres": (1, 2), "nblock": 1, "batch": 8, "lr": 1e-2,
         "lr_rampup": 0.0, "workers": 0, "augment": 0.0, "dropout": 0.0}


def make_trainer(data, state=None, **options):
    config = TrainConfig(data=str(data), **SMALL | options)
    trainer = Trainer(config, ImageFolderDataset(data), CPU)
    if state is not None:
        restore_(trainer, state)
    trainer.start()
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.net.named_parameters()}


def as_foreign(content, *, layout=torch.contiguous_format, ls=1.0):
    """Returns a state of ours as EDM's would say it, with moments [O, I, H, W] laid out so."""
    moments = {i: {name: value.contiguous(memory_format=layout) if value.ndim == 4
                   else value.contiguous() for name, value in entry.items()}
               for i, entry in content["optimizer"]["state"].items()}
    return {"format": "edm-training-state", "network": content["network"], "net": content["net"],
            "ema": None, "progress": {"cur_nimg": None}, "options": {"ls": ls},
            "optimizer": {"state": moments}}


@pytest.fixture
def after_three_steps(dataset_zip):
    trainer = make_trainer(dataset_zip)
    for _ in range(3):
        trainer.train_step()
    return trainer, copy.deepcopy(trainer.state())


# ---------------------------------------------------------------------------- moments


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_first_step_after_a_foreign_resume_is_that_of_adam(after_three_steps, dataset_zip,
                                                               layout):
    _, content = after_three_steps
    foreign = as_foreign(content, layout=layout)
    trainer = make_trainer(dataset_zip, State("training-state-000005.pt", foreign))
    before, names = weights(trainer), [name for name, _ in trainer.net.named_parameters()]
    trainer.train_step()
    kernels = 0
    for i, name in enumerate(names):
        grad = dict(trainer.net.named_parameters())[name].grad
        if grad is None:
            continue
        then = foreign["optimizer"]["state"][i]
        kernels += grad.ndim == 4 and grad.stride() != then["exp_avg"].stride()
        m = 0.9 * then["exp_avg"].double() + 0.1 * grad.double()
        v = 0.999 * then["exp_avg_sq"].double() + 0.001 * grad.double() ** 2
        expected = -1e-2 * (m / (1 - 0.9**4)) / ((v / (1 - 0.999**4)).sqrt() + 1e-8)
        step = dict(trainer.net.named_parameters())[name].detach() - before[name]
        torch.testing.assert_close(step.double(), expected, rtol=1e-3, atol=1e-6, msg=name)
    if layout == torch.contiguous_format:
        assert kernels > 5, "the layouts have to differ for this to be a test"


def test_every_moment_has_the_layout_of_its_parameter(after_three_steps, dataset_zip):
    _, content = after_three_steps
    trainer = make_trainer(dataset_zip, State("x.pt", as_foreign(content)))
    for parameter, moments in trainer.optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert moments[name].stride() == parameter.stride()


def first_moments(trainer):
    return {i: dict(entry) for i, entry in trainer.optimizer.state_dict()["state"].items()}


@pytest.mark.long
@pytest.mark.parametrize("is_foreign", [False, True])
@pytest.mark.parametrize("ls", [1.0, 16.0])
def test_moments_of_another_loss_scale_are_brought_to_this_runs(dataset_zip, is_foreign, ls):
    """A power of two changes no digit: moments are ls and ls^2 times those of scale one."""
    runs = {}
    for scale in (ls, 64.0):
        trainer = make_trainer(dataset_zip, ls=scale)
        trainer.train_step()
        runs[scale] = copy.deepcopy(trainer.state())
    state = State("x.pt", as_foreign(runs[64.0], ls=64.0) if is_foreign else runs[64.0])
    found = first_moments(make_trainer(dataset_zip, state, ls=ls))
    for i, entry in runs[ls]["optimizer"]["state"].items():
        # Below the smallest normal number digits are lost.
        torch.testing.assert_close(found[i], entry, rtol=1e-6, atol=torch.finfo(torch.float32).tiny)
    assert not torch.equal(runs[64.0]["optimizer"]["state"][2]["exp_avg_sq"],
                           runs[ls]["optimizer"]["state"][2]["exp_avg_sq"])


def test_a_dynamic_loss_scale_that_is_new_starts_as_in_a_fresh_run(dataset_zip):
    trainer = make_trainer(dataset_zip)
    trainer.train_step()
    state = State("x.pt", copy.deepcopy(trainer.state()))
    assert float(make_trainer(dataset_zip, state, precision="fp16").loss_scale) == 2.0**16
    trainer = make_trainer(dataset_zip, precision="fp16")
    trainer.loss_scale = torch.tensor(512.0)
    trainer.counters["good_since_change"] += 7
    state = State("x.pt", copy.deepcopy(trainer.state()))
    resumed = make_trainer(dataset_zip, state, precision="fp16")
    assert float(resumed.loss_scale) == 512 and resumed.counters["good_since_change"] == 7


# ---------------------------------------------------------------------------- states of others


def foreign_network():
    config = TrainConfig(data="x", arch="ncsnpp", cbase=8, cres=(1, 2), nblock=1)
    torch.manual_seed(0)
    return build_network(config.network(8, 3, 0))


def averaged_network():
    net = foreign_network()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    return net


def write_edm_run(folder, *, has_ema=False, use_fp16=False, ls=None):
    """Writes training-state-000005.pt as EDM does, and what lies beside it."""
    folder.mkdir()
    zipped = next(name for name in CONTAINERS if "zip" in name.lower())
    net = foreign_network().train()
    given = {k: v for k, v in net.config.items() if k not in ("class_name", "pfgmpp")}
    given |= {"use_fp16": use_fp16}
    path = folder / "training-state-000005.pt"
    path.write_bytes(CONTAINERS[zipped]({
        "net": stored(net, given), "optimizer_state": optimizer_state(net)}))
    if has_ema:
        ema = averaged_network().eval().requires_grad_(False)
        (folder / "network-snapshot-000005.pkl").write_bytes(CONTAINERS[zipped]({
            "ema": stored(ema, given), "augment_pipe": None, "dataset_kwargs": {}}))
    if ls is not None:
        (folder / "training_options.json").write_text(json.dumps({"loss_scaling": ls}))
    return path


def resumed_run(invoke, data, run_dir, *flags):
    return invoke(train.main, f"--outdir={run_dir}", "--nosubdir", f"--data={data}", *TINY_RUN,
                  "--augment=0.12", "--tick=0.008", "--duration=0.005008", "--ema=1000", *flags)


@pytest.mark.long
def test_the_average_of_edm_is_taken_from_the_snapshot_beside_the_state(tmp_path, dataset_zip,
                                                                        invoke):
    path = write_edm_run(tmp_path / "edm", has_ema=True)
    result = resumed_run(invoke, dataset_zip, tmp_path / "run", f"--resume={path}")
    assert result.exit_code == 0, result.output
    assert re.search(r"averaged weights are those of \S*network-snapshot-000005.pkl", result.output)
    after = checkpoint.load(tmp_path / "run/training-state-000005.008.pt")
    keep = 0.5 ** (8 / (0.05 * 5000))  # a half-life of 5% of the images seen, for one step
    for name, p in averaged_network().named_parameters():
        expected = keep * p + (1 - keep) * after["net"][name]
        torch.testing.assert_close(after["ema"][name], expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_ema", [True, False])
def test_sampling_a_state_of_edm_says_whose_weights_it_takes(has_ema, tmp_path, capsys):
    path = write_edm_run(tmp_path / "edm", has_ema=has_ema)
    sampler = NetworkSampler.open(str(path), torch.device("cpu"), pfgmpp=False)
    expected = averaged_network() if has_ema else foreign_network()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(sampler.net.state_dict()[name], value, atol=0.01, rtol=0)
    said = capsys.readouterr()
    assert has_ema == ("network-snapshot-000005.pkl are sampled" in said.out)
    assert has_ema != ("the plain weights are used, which sample worse" in said.err)


def test_without_a_snapshot_beside_it_the_average_is_said_to_begin_anew(tmp_path, dataset_zip,
                                                                        invoke):
    path = write_edm_run(tmp_path / "edm")
    result = resumed_run(invoke, dataset_zip, tmp_path / "run", f"--resume={path}")
    assert result.exit_code == 0, result.output
    assert "does not hold random state, data position, averaged weights" in result.output
    assert "there is no network-snapshot of the same number beside it" in result.output


def test_the_loss_scale_of_edm_is_read_beside_the_state_or_asked_for(tmp_path, dataset_zip, invoke):
    state, _ = read_state(str(write_edm_run(tmp_path / "a", use_fp16=True, ls=100)), None)
    assert state.content["options"]["ls"] == 100
    path = write_edm_run(tmp_path / "b", use_fp16=True)
    run = tmp_path / "run"
    result = resumed_run(invoke, dataset_zip, run, f"--resume={path}", "--augment=0.12")
    assert result.exit_code == 2 and "loss scale that is not recorded; give the --ls" in \
        result.output
    assert not run.exists() and len(result.output.strip().splitlines()) == 1
    config = TrainConfig(data="x", ls=100)
    _, state = settle_options(config, 0, read_state(str(path), None)[0], override=False)
    assert state.content["options"]["ls"] == 100


def test_a_snapshot_of_another_network_beside_the_state_is_refused(tmp_path, dataset_zip, invoke):
    path = write_edm_run(tmp_path / "edm")
    write_snapshot(tmp_path / "edm/network-snapshot-000005.pkl", label_dim=3)
    result = resumed_run(invoke, dataset_zip, tmp_path / "run", f"--resume={path}")
    assert result.exit_code == 1 and "is of another network (label_dim: 0 here, 3 there)" in \
        result.output.replace("\n", " ")


@pytest.mark.long
def test_the_loss_scale_of_edm_is_known_at_a_second_start_in_its_directory(tmp_path, dataset_zip,
                                                                           invoke):
    path = write_edm_run(tmp_path / "edm", ls=100)
    result = resumed_run(invoke, dataset_zip, tmp_path / "edm", f"--resume={path}")
    assert result.exit_code == 0, result.output  # and training_options.json is ours now
    state, _ = read_state(str(path), None)
    assert state.content["options"]["ls"] == 100


def test_what_is_assumed_of_a_foreign_state_is_in_the_log(tmp_path, dataset_zip, invoke):
    path = write_edm_run(tmp_path / "edm")
    resumed_run(invoke, dataset_zip, tmp_path / "run", f"--resume={path}", "--quiet")
    log = (tmp_path / "run/log.txt").read_text()
    assert "does not record its loss scale; it is assumed to be 1, the default" in log


@pytest.mark.parametrize("flag, words", [
    ("--augment=0", "model.map_augment.weight: None here, [16, 9] there"),
    ("--ares=8", "model.enc.8x8_block0.")])
def test_a_foreign_state_that_does_not_fit_leaves_no_folder(flag, words, tmp_path, dataset_zip,
                                                            invoke):
    path = write_edm_run(tmp_path / "edm")
    result = resumed_run(invoke, dataset_zip, tmp_path / "run", f"--resume={path}", flag)
    assert result.exit_code == 1 and words in result.output
    assert "such as --augment and --ares" in result.output and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------- options


def test_what_an_option_comes_to_is_compared():
    now = TrainConfig(data="x", lr_decay="cosine", lr_rampup=2.0, lr_decay_start=2.0, ls=1.0)
    then = TrainConfig(data="x", lr_decay="cosine", lr_rampup=2.0)
    assert changed_options(now, then.to_dict()) == changed_options(then, now.to_dict()) == []
    fp16 = TrainConfig(data="x", precision="fp16")
    assert "--ls=1 (none in the state)" in changed_options(
        TrainConfig(data="x", precision="fp16", ls=1.0), fp16.to_dict())


# ---------------------------------------------------------------------------- draws


def test_states_record_the_version_of_their_draws_and_another_is_refused(after_three_steps):
    trainer, content = after_three_steps
    assert content["progress"]["draws"] == DRAWS_VERSION
    settle_options(trainer.config, None, State("x.pt", content), override=False)
    content["progress"]["draws"] = DRAWS_VERSION + 1
    with pytest.raises(Exception, match=f"random draws of version {DRAWS_VERSION} "
                                        rf"\({DRAWS_VERSION + 1} in the state"):
        settle_options(trainer.config, None, State("x.pt", content), override=False)
    _, state = settle_options(trainer.config, None, State("x.pt", content), override=True)
    assert len(state.changed) == 1
    del content["progress"]["draws"]  # written before it was recorded
    _, state = settle_options(trainer.config, None, State("x.pt", content), override=True)
    assert len(state.changed) == (DRAWS_VERSION != 1)


# ---------------------------------------------------------------------------- transfer


def start(invoke, data, outdir, *flags):
    return invoke(train.main, f"--outdir={outdir}", "--name=run", f"--data={data}", *TINY_RUN,
                  "--duration=0.000008", *flags)


@pytest.mark.long
@pytest.mark.parametrize("source, flags, left_out", [
    ({"label_dim": 5}, ["--cond=1"], {"map_label"}),  # other classes
    ({"label_dim": 2, "augment": 0.0}, ["--cond=1", "--augment=0.1"], {"map_augment"}),
    ({"label_dim": 0, "shape": (1, 8, 8)}, ["--cond=0"], {"8x8_conv", "aux_conv", "aux_residual"}),
    ({"label_dim": 0, "pfgmpp": True, "aug_dim": 64}, ["--cond=0"], set()),  # another D
])
def test_a_transfer_takes_all_that_fits_and_lists_the_rest(source, flags, left_out, dataset_zip,
                                                           tmp_path, invoke):
    path = write_snapshot(tmp_path / "source.pt", **source)
    theirs = checkpoint.load(path)["ema"]
    result = start(invoke, dataset_zip, tmp_path, f"--transfer={path}", *flags)
    assert result.exit_code == 0, result.output
    listed = re.findall(r"^ +(\S+) \((.*) there, (.*) here\)$", result.output, re.M)
    after = checkpoint.load(tmp_path / "run/training-state-000000.pt")  # lr is 0 in step 1
    taken = {name for name, value in theirs.items()
             if name in after["net"] and torch.equal(after["net"][name], value)}
    assert {name for name, _, _ in listed} == (theirs.keys() | after["net"].keys()) - taken
    assert taken and all(any(part in name for part in left_out) for name, _, _ in listed)
    assert all(any(part in name for name, _, _ in listed) for part in left_out)
    # What is new begins at random, and is forgotten by the average as in a new run.
    assert (after["progress"]["ema_rampup"] is None) == (not left_out)
    # Otherwise, 0.5^(8/10) of it is what was transferred after 8 images at a half-life of 10.
    warning = ("--ema=1e-05 is long for --duration=8e-06: the averaged weights, which are sampled, "
               "will still be 57.4% the transferred ones; give a shorter half-life, such as "
               "--ema=8e-07")
    assert (warning in result.output) == (not left_out)


def test_a_transfer_of_which_nothing_fits_is_refused_and_leaves_no_folder(tmp_path, invoke):
    path = write_snapshot(tmp_path / "source.pt", label_dim=0)
    data = write_dataset(tmp_path / "gray.zip", channels=1)
    result = start(invoke, data, tmp_path / "runs", f"--transfer={path}", "--cbase=20", "--cres=1")
    lines = result.output.strip().splitlines()
    assert result.exit_code == 1 and "none of its weights fits this network" in lines[-1]
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_a_dry_run_says_what_a_transfer_would_take(dataset_zip, tmp_path, invoke):
    path = write_snapshot(tmp_path / "source.pt", label_dim=0)
    fits = start(invoke, dataset_zip, tmp_path / "runs", f"--transfer={path}", "--dry-run")
    assert fits.exit_code == 0 and "100% of the network's parameters" in fits.output
    assert "are transferred; the others start at random" not in fits.output
    assert "will still be 57.4% the transferred ones" in fits.output
    listed, end = (fits.output.index(words) for words in ("Transferred ", "Dry run: nothing"))
    assert listed < end
    hardly = start(invoke, dataset_zip, tmp_path / "runs", f"--transfer={path}", "--dry-run",
                   "--cbase=12")
    assert "of this network's parameters are transferred; the others start" in hardly.output
    missing = start(invoke, dataset_zip, tmp_path / "runs", "--transfer=no.pt", "--dry-run")
    assert missing.exit_code == 1 and not (tmp_path / "runs").exists()


def test_weights_are_compared_by_parameters_only(tmp_path):
    # The filter of every resampling block has the same shape in all networks.
    path = write_snapshot(tmp_path / "source.pt", label_dim=0)
    content = checkpoint.load(path)
    content["ema"] = {name: value for name, value in content["ema"].items() if "filter" in name}
    assert content["ema"]
    checkpoint.save(path, content)
    with pytest.raises(ValueError, match="none of its weights fits"):
        open_weights(str(path), foreign_network())


@pytest.mark.long
def test_auto_goes_on_where_there_is_a_state_and_transfers_where_there_is_none(
        dataset_zip, tmp_path, invoke):
    path = write_snapshot(tmp_path / "source.pt", label_dim=0)
    args = (f"--transfer={path}", "--resume=auto", "--tick=0.008")
    first = start(invoke, dataset_zip, tmp_path, *args)
    assert first.exit_code == 0 and "Transferred" in first.output, first.output
    second = start(invoke, dataset_zip, tmp_path, *args, "--duration=0.000016")
    assert second.exit_code == 0 and "Resuming from" in second.output, second.output
    assert "Transferred" not in second.output
    state = tmp_path / "run/training-state-000000.016.pt"
    config = tmp_path / "run/training_options.json"  # has the transfer
    again = start(invoke, dataset_zip, tmp_path, f"--config={config}", f"--resume={state}",
                  "--duration=0.000024", "--tick=0.008")
    assert again.exit_code == 0 and "Resuming from" in again.output, again.output
    one = invoke(train.main, f"--outdir={tmp_path}", f"--data={dataset_zip}",
                 f"--transfer={path}", f"--resume={path}")
    assert one.exit_code == 2 and "--resume=FILE and --transfer: choose one" in one.output


def test_the_data_of_a_transfer_may_have_another_number_of_channels(tmp_path, invoke):
    data = write_dataset(tmp_path / "gray.zip", channels=1)
    path = write_snapshot(tmp_path / "source.pt", label_dim=0)
    result = start(invoke, data, tmp_path, f"--transfer={path}")
    assert result.exit_code == 0 and "8x8_conv.weight ([8, 3, 3, 3] there" in result.output


def test_levels_are_paired_by_their_place_where_there_are_equally_many_else_by_their_size(tmp_path):
    source = write_snapshot(tmp_path / "a.pt", shape=(3, 16, 16), label_dim=0)
    theirs = checkpoint.load(source)["ema"]
    for cres, pairs in (((1, 2), {"32x32": "16x16", "16x16": "8x8"}),
                        ((1, 1, 2), {"16x16": "16x16", "8x8": "8x8"})):
        config = TrainConfig(data="x", cres=cres, arch="ncsnpp", cbase=8, nblock=1)
        found = open_weights(str(source), build_network(config.network(32, 3, 0))).tensors
        level = re.compile(r"\d+x\d+")
        assert {size[0] for size in map(level.search, found) if size} == pairs.keys()
        for name, tensor in found.items():
            size = level.search(name)
            there = name.replace(size[0], pairs[size[0]]) if size else name
            assert torch.equal(tensor, theirs[there])


@pytest.mark.parametrize("here, there", [
    ({"a": 1}, {"a": 1, "b": 2}), ({"a": 1, "b": 2}, {"a": 1})])
def test_a_key_of_one_side_alone_is_a_difference(here, there):
    assert checkpoint.first_difference(here, there).startswith("b: ")
    assert checkpoint.first_difference(here, here) is None


def test_a_state_of_a_network_with_label_dropout_needs_it(tmp_path, invoke):
    data = write_dataset(tmp_path / "labels.zip")
    args = ("--cond=1", "--tick=0.008")
    start(invoke, data, tmp_path, *args, "--label-dropout=0.1")
    result = start(invoke, data, tmp_path, *args, "--resume=auto", "--duration=0.000016")
    assert result.exit_code == 1 and "label_dropout: None here, 0.1 there" in result.output
