"""Every option of training decides something: what is learned, or what another test looks at."""

import dataclasses
import functools
import re

import pytest
import torch
from scripts import ROOT
from snapshots import write_snapshot
from tiny import TINY_RUN, write_dataset

import train
from checkpoints.checkpoint import digest
from images.dataset import ImageFolderDataset
from pfgmpp.networks import build_network
from torch_utils.misc import configure_backends
from training.config import TrainConfig
from training.resume import open_weights
from training.trainer import Trainer

BASE = {"arch": "ncsnpp", "cbase": 8, "cres": (1, 2), "nblock": 1, "batch": 8, "lr": 1e-2,
        "lr_rampup": 0.0, "workers": 0, "augment": 0.0, "dropout": 0.1}
# Another value, and what else both runs have so that it can matter.
LEARNED = {
    "cond": (True, {}), "cond_image": (True, {}), "cond_c_in": (True, {"cond_image": True}),
    "patch": (4, {}), "patches": (3, {"patch": 4}), "arch": ("ddpmpp", {}), "precond": ("ve", {}),
    "pfgmpp": (True, {}), "aug_dim": (3.0, {"pfgmpp": True}), "stf": (True, {"rbatch": 16}),
    "rbatch": (24, {"stf": True}), "lsun": (True, {}), "loss": ("ve", {}), "P_mean": (-0.4, {}),
    "P_std": (1.0, {}), "batch": (16, {}), "cbase": (16, {}),
    "cres": ((1, 1), {}), "nblock": (2, {}), "ares": ((8,), {}), "lr": (2e-2, {}),
    "lr_rampup": (1e-4, {}), "lr_decay": ("rsqrt", {"lr_decay_start": 8e-6}),
    "lr_decay_start": (4e-6, {"lr_decay": "rsqrt", "lr_rampup": 8e-6}),
    "ema": (1e-7, {}), "dropout": (0.5, {}), "augment": (0.5, {}),
    "label_dropout": (0.9, {"cond": True}), "sigma_data": (0.3, {}), "xflip": (True, {}),
    "precision": ("bf16", {}), "ls": (3.0, {}), "clip_grad": (1e-9, {}),
    "seed": (1, {}), "transfer": ("snapshot.pt", {}),
}
# Options that change when and where, not what is learned, and the tests that see what they change.
ELSEWHERE = {
    "data": "other_data_need_overriding_and_changed_data_are_refused",
    "duration": "files_of_a_run_follow_its_options", "tick": "files_of_a_run_follow_its_options",
    "snap": "files_of_a_run_follow_its_options", "dump": "files_of_a_run_follow_its_options",
    "keep": "files_of_a_run_follow_its_options", "samples": "files_of_a_run_follow_its_options",
    "window": "pictures_of_a_run_show_the_window",
    "batch_gpu": "the_gradient_is_that_of_the_loss_of_the_whole_batch",
    "max_bad_steps": "too_many_bad_steps_in_a_row_end_the_run_and_name_the_step",
    "bench": "kernels_are_chosen_as_asked", "deterministic": "kernels_are_chosen_as_asked",
    "checkpoint_blocks": "a_run_that_checkpoints_writes_what_another_does",
    "compile": "networks_are_compiled_by_themselves_on_gpus_alone",
    "data_on_device": "training_is_the_same_to_the_bit",
    "cache": "without_the_packed_file_there_is_nothing_to_copy",
    "workers": "a_resumed_run_is_byte_identical_to_an_undisturbed_one",
    "log": "an_unknown_sink_is_told_the_known_ones",
    **dict.fromkeys(("eval", "eval_ref", "eval_num", "eval_detector"),
                    "scores_during_training_are_those_of_the_states"),
    "eval_pairs": "pairs_are_denoised_by_one_evaluation_at_their_noise",
    **dict.fromkeys(("eval_solver", "eval_steps"), "grids_and_scores_are_sampled_as_asked"),
    **dict.fromkeys(("val_data", "val_num"), "a_run_reports_the_held_out_loss_of_its_snapshots"),
    **dict.fromkeys(("plugin", "plugin_sha256"), "a_run_records_its_file_and_goes_on_only_with_it"),
    "preset": "a_preset_is_a_run_that_can_be_built",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def digest_of(folder):
    """Returns a function that trains three steps and returns what the weights are then."""
    data = write_dataset(folder / "data.zip")
    write_snapshot(folder / "snapshot.pt", seed=5, label_dim=0, augment=0.0)
    source = ImageFolderDataset(data)

    class WithConditions(ImageFolderDataset):
        """Its own images, as condition images beside them."""

        cond_channels = 3

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.cond_shape, self.cond_scaling = [3, 8, 8], source.scaling

        def get_batch(self, indices):
            images, labels = super().get_batch(indices)
            return images, labels, images

        def __getitem__(self, idx):
            image, label = super().__getitem__(idx)
            return image, label, image

    @functools.cache
    def trained(options):
        config = TrainConfig(data=str(data), **BASE | dict(options))
        cls = WithConditions if config.cond_image else ImageFolderDataset
        dataset = cls(data, use_labels=config.cond, xflip=config.xflip, patch=config.patch)
        weights = None
        if config.transfer:
            net = build_network(config.network(8, 3, 0))
            weights = open_weights(str(folder / config.transfer), net).tensors
        trainer = Trainer(config, dataset, torch.device("cpu"), weights)
        trainer.start()
        for _ in range(3):
            trainer.train_step()
        return digest([dict(trainer.net.state_dict()), dict(trainer.ema.state_dict())])

    return lambda **options: trained(tuple(sorted(options.items())))


@pytest.mark.long
@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned_depends_on_the_option(digest_of, name):
    value, others = LEARNED[name]
    plain = digest_of(**others)
    assert digest_of(**others, **{name: value}) != plain


@pytest.mark.long
def test_the_same_options_learn_the_same(digest_of):
    assert digest_of() == digest_of(samples=5, tick=1.0, keep=3)


def test_every_option_is_learned_or_seen_elsewhere():
    assert not LEARNED.keys() & ELSEWHERE.keys()
    assert LEARNED.keys() | ELSEWHERE.keys() == {
        field.name for field in dataclasses.fields(TrainConfig)}
    there = {name for path in (ROOT / "tests").rglob("test_*.py")
             for name in re.findall(r"^def test_(\w+)", path.read_text(), re.M)}
    assert set(ELSEWHERE.values()) <= there


@pytest.mark.parametrize("searches, deterministic", [(True, False), (False, True)])
@pytest.mark.parametrize("precision, has_tf32", [("fp32", False), ("tf32", True), ("bf16", False)])
def test_kernels_are_chosen_as_asked(searches, deterministic, precision, has_tf32):
    try:
        configure_backends(precision, benchmark=searches, deterministic=deterministic)
        assert torch.backends.cudnn.benchmark is (searches and not deterministic)
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert torch.backends.cuda.matmul.allow_tf32 is has_tf32
        assert torch.backends.cudnn.allow_tf32 is has_tf32
        assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    finally:
        configure_backends("fp32", benchmark=False)
        torch.use_deterministic_algorithms(False)


FILES = ("reals.png", "samples-*.png", "network-snapshot-*.pt", "training-state-*.pt")


@pytest.mark.long
@pytest.mark.parametrize("flag, ticks, files", [
    # Eight steps, a tick each. The first tick is 0, and the last one writes everything.
    ("--duration=0.000064", 8, {"network-snapshot-*.pt": 3, "training-state-*.pt": 2}),
    pytest.param("--duration=0.000032", 4, {"network-snapshot-*.pt": 2, "training-state-*.pt": 1},
                 marks=pytest.mark.slow),
    ("--tick=0.016", 5, {"network-snapshot-*.pt": 2, "training-state-*.pt": 1}),
    ("--snap=2", 8, {"network-snapshot-*.pt": 5, "training-state-*.pt": 2}),
    ("--dump=2", 8, {"network-snapshot-*.pt": 3, "training-state-*.pt": 4}),
    ("--keep=1", 8, {"network-snapshot-*.pt": 3, "training-state-*.pt": 1}),
    ("--samples=4", 8, {"network-snapshot-*.pt": 3, "training-state-*.pt": 2, "reals.png": 1,
                        "samples-*.png": 3}),
])
def test_files_of_a_run_follow_its_options(dataset_zip, tmp_path, invoke, flag, ticks, files):
    result = invoke(train.main, f"--outdir={tmp_path}", "--name=a", f"--data={dataset_zip}",
                    *TINY_RUN, "--duration=0.000064", "--tick=0.008", "--snap=4", "--dump=4", flag)
    assert result.exit_code == 0, result.output
    run = tmp_path / "a"
    assert len((run / "stats.jsonl").read_text().splitlines()) == ticks
    found = {pattern: len(list(run.glob(pattern))) for pattern in FILES}
    assert {pattern: num for pattern, num in found.items() if num} == files
