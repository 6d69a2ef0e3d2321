"""Checks that need a CUDA device: `pytest -m gpu`."""

import math

import numpy as np
import pytest
import torch
from scripts import run_script
from tiny import TINY_RUN

from checkpoints import checkpoint
from images.dataset import ImageFolderDataset
from pfgmpp.kernel import PerturbationKernel
from pfgmpp.networks import build_network
from sampling.network_sampler import NetworkSampler
from training.config import TrainConfig
from training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def check_no_sync(trainer, steps):
    """Takes steps in which waiting for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(steps):
            trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in trainer.net.parameters())


@pytest.mark.parametrize("options", [
    {}, {"pfgmpp": True}, {"precision": "bf16"}, {"precision": "fp16"},
    {"precond": "vp"}, {"precond": "ve"}, {"arch": "adm", "cbase": 32, "augment": 0.0},
])
def test_a_training_step_never_waits_for_the_device(dataset_zip, options):
    config = TrainConfig(data=str(dataset_zip), **({
        "arch": "ncsnpp", "cbase": 8, "cres": (1, 2), "nblock": 1, "batch": 8, "workers": 0,
        "data_on_device": "0"} | options))
    trainer = Trainer(config, ImageFolderDataset(dataset_zip, cache=True), torch.device("cuda", 0))
    trainer.start()
    for _ in range(3):
        trainer.train_step()
    images = [batch for _, batch in zip(range(3), trainer._batches, strict=False)]
    pinned = [(i.pin_memory(), labels.pin_memory()) for i, labels in images]
    trainer._batches = iter(pinned)
    check_no_sync(trainer, len(pinned))


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_nor_does_one_on_arrays_with_conditions(tmp_path, dtype):
    rng = np.random.default_rng(0)
    for name in ("x", "cond/x"):
        for i in range(16):
            path = tmp_path / f"{name}{i:02d}.npy"
            path.parent.mkdir(exist_ok=True)
            np.save(path, rng.integers(0, 9, [2, 8, 12]).astype(dtype))
    config = TrainConfig(data=str(tmp_path), arch="ncsnpp", cbase=8, cres=(1, 2), nblock=1,
                         batch=8, workers=0, cond_image=True, data_on_device="0")
    dataset = ImageFolderDataset(tmp_path, cache=True, use_conditions=True)
    trainer = Trainer(config, dataset, torch.device("cuda", 0))
    trainer.start()
    trainer.train_step()
    pinned = [tuple(t.pin_memory() for t in batch)
              for _, batch in zip(range(2), trainer._batches, strict=False)]
    trainer._batches = iter(pinned)
    check_no_sync(trainer, len(pinned))


def test_nor_does_one_that_takes_its_batch_on_the_device(dataset_zip):
    config = TrainConfig(data=str(dataset_zip), arch="ncsnpp", cbase=8, cres=(1, 2), nblock=1,
                         batch=8, xflip=True, data_on_device="1")
    dataset = ImageFolderDataset(dataset_zip, cache=True, xflip=True)
    trainer = Trainer(config, dataset, torch.device("cuda", 0))
    trainer.start()
    trainer.train_step()
    check_no_sync(trainer, 3)


def test_a_compiled_network_trains_alike(dataset_zip):
    losses = []
    for compiled in "01":
        config = TrainConfig(data=str(dataset_zip), arch="ncsnpp", cbase=32, cres=(1, 2), nblock=1,
                             batch=16, dropout=0.0, compile=compiled)
        trainer = Trainer(config, ImageFolderDataset(dataset_zip, cache=True),
                          torch.device("cuda", 0))
        trainer.start()
        losses.append([])
        for _ in range(4):
            trainer.train_step()
            losses[-1].append(float(trainer._step_loss))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_sampler_of_cuda_graphs_gives_the_same_images(tmp_path):
    config = TrainConfig(data="none", arch="ncsnpp", cbase=32, cres=(1, 2), nblock=1)
    net = build_network(config.network(16, 3, 4))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    checkpoint.save(tmp_path / "net.pt", {
        "format": checkpoint.SNAPSHOT_FORMAT, "network": net.config,
        "ema": dict(net.state_dict()), "progress": {"cur_nimg": 0}, "options": config.to_dict()})
    found = []
    for compiled in (False, True):
        sampler = NetworkSampler.open(str(tmp_path / "net.pt"), torch.device("cuda", 0),
                                      compiled=compiled, num_steps=6)
        batches = list(sampler.images([range(8), range(8, 11)]))
        found.append(torch.cat([batch.images for batch in batches]))
    assert found[1].shape == found[0].shape == (11, 3, 16, 16)
    assert (found[1] - found[0]).abs().max() < 1e-3


@pytest.mark.parametrize("arch, cbase", [("ncsnpp", 32), ("ddpmpp", 32), ("adm", 64)])
def test_networks_agree_with_the_cpu(arch, cbase):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    config = TrainConfig(data="none", arch=arch, cbase=cbase, cres=(1, 2), nblock=1)
    net = build_network(config.network(16, 3, 4)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    x, sigma, labels = torch.randn(4, 3, 16, 16), torch.tensor([0.01, 0.3, 2, 50]), torch.eye(4)
    expected = net(x, sigma, labels)
    given = net.cuda()(x.cuda(), sigma.cuda(), labels.cuda()).cpu()
    assert (given - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("D", [0.7, 2, 128, 1e6, math.inf])
def test_the_kernel_on_the_device_has_the_same_law(D):
    """Medians of the radial factor, which need no moments to exist."""
    scales = [PerturbationKernel(D).scale(200_000, torch.Generator(device).manual_seed(0))
              for device in ("cpu", "cuda")]
    cpu, gpu = (s.cpu().log() for s in scales)
    for q in (0.1, 0.5, 0.9):
        spread = cpu.quantile(0.6) - cpu.quantile(0.4)
        assert abs(cpu.quantile(q) - gpu.quantile(q)) <= 0.1 * spread + 1e-12


def test_memory_that_runs_out_is_one_line(dataset_zip, tmp_path):
    done = run_script("train.py", f"--data={dataset_zip}", f"--outdir={tmp_path}", *TINY_RUN,
                      "--batch=100000", "--cbase=256", "--duration=1", check=False)
    assert done.returncode == 1
    assert "Error: out of GPU memory; use a smaller --batch-gpu" in done.stderr
    assert "Traceback" not in done.stderr
