"""What runs on a GPU, on one that is not there: nothing mixes devices, and no step waits for it.

"There" is on that device, "here" on the CPU.
"""

import contextlib
import copy
import functools
import itertools
import json
import math

import numpy as np
import pytest
import torch
from fake_gpu import DEVICE, FakeGpu
from tiny import write_dataset

from checkpoints import checkpoint
from images import scaling
from images.dataset import ImageFolderDataset
from metrics import inception
from metrics.bootstrap import bootstrap_frechet
from metrics.detectors import Pixels, build_detector
from metrics.distances import density_coverage, frechet_distance, kernel_distance, precision_recall
from metrics.metrics import collect
from metrics.nearest import nearest_neighbours
from metrics.per_class import scores_by_class
from metrics.statistics import ClassStatistics, FeatureStatistics
from pfgmpp import augment, load
from pfgmpp.augment import AugmentPipe
from pfgmpp.guidance import guided
from pfgmpp.kernel import PerturbationKernel
from pfgmpp.loss import LOSSES
from pfgmpp.networks import build_network
from pfgmpp.samplers import (
    SamplerConfig,
    ablation_sampler,
    draw_latents,
    edm_sampler,
    generate_images,
    to_uint8,
    trajectory,
)
from pfgmpp.schedules import DISCRETIZATIONS, SCALINGS, SCHEDULES
from pfgmpp.solvers import SOLVERS
from sampling.network_sampler import NetworkSampler
from torch_utils import training_stats
from torch_utils.misc import compute_dtype
from training.config import ARCHITECTURES, PRECISIONS, PRECONDITIONERS, TrainConfig
from training.device_data import DeviceData
from training.resume import State, restore_
from training.trainer import Trainer
from training.training_loop import training_loop

CPU = torch.device("cpu")
LABELS, SIDE, BATCH = 3, 8, 4
METRIC = "Metrics/frechet_distance"


def forget():
    """Drops what modules keep of a device for the next call."""
    for cached in (augment._upsampler, augment._downsampler, scaling._columns):
        cached.cache_clear()
    training_stats.Collector()


@pytest.fixture
def gpu():
    forget()
    with FakeGpu() as gpu:
        yield gpu
    forget()


@functools.cache
def built(arch, precond, D, cond_channels, augment):
    config = TrainConfig(
        data="none", arch=arch, precond=precond, pfgmpp=math.isfinite(D), aug_dim=D, cond=True,
        augment=augment, label_dropout=0.2, cbase=32 if arch == "adm" else 8, cres=(1, 2), nblock=1)
    torch.manual_seed(0)
    net = build_network(config.network(SIDE, 3, LABELS, cond_channels))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return net


def network(device=DEVICE, arch="ddpmpp", precond="edm", D=math.inf, cond_channels=0, augment=0.5,
            precision="fp32"):
    net = copy.deepcopy(built(arch, precond, D, cond_channels, augment)).to(device)
    net.compute_dtype = compute_dtype(precision)
    return net


def images(*shape, device=DEVICE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)


def one_hot(device=DEVICE):
    return torch.eye(LABELS)[[0, 2, 1, 0]].to(device)


# ---------------------------------------------------------------------- the GPU that is not there


def vector(device=DEVICE):
    return torch.arange(1.0, 4.0, device=device)


@pytest.mark.parametrize("mixture", [
    lambda: vector() + vector(CPU),
    lambda: vector(CPU) * vector()[0],
    lambda: torch.cat([vector(), vector(CPU)]),
    lambda: torch.stack([vector()[0], torch.tensor(2.0)]),
    lambda: torch.eye(3, device=DEVICE) @ torch.eye(3),
    lambda: vector().index_select(0, torch.tensor([0, 2])),
    lambda: torch.where(vector(CPU) > 1, vector(), 0.0),
    lambda: vector().add_(vector(CPU)),
    lambda: torch.zeros([]).add_(vector()[0]),
    lambda: vector(CPU)[torch.zeros(1, dtype=torch.int64, device=DEVICE)],
    lambda: torch.randn(3, generator=torch.Generator(DEVICE)),
    lambda: torch.randn(3, generator=torch.Generator(), device=DEVICE),
    lambda: torch._standard_gamma(vector(), generator=torch.Generator()),
    lambda: vector().numpy(),
    lambda: np.asarray(vector()),
])
def test_what_a_gpu_refuses_is_refused(gpu, mixture):
    with pytest.raises((RuntimeError, TypeError), match="same device|a generator of|numpy"):
        mixture()


@pytest.mark.parametrize("allowed", [
    lambda d: vector(d) * torch.tensor(2.0),
    lambda d: torch.where(vector(d) > 1, vector(d), torch.tensor(2.0)),
    lambda d: vector(d).where(vector(d) > 1, 0),
    lambda d: torch.randn(3, generator=torch.Generator(d).manual_seed(1), device=d),
    lambda d: torch.zeros_like(vector(d)) + vector(d).new_ones(3),
    lambda d: vector(d).clamp_(max=2).view(3, 1).double().mul_(2)[1:],
    lambda d: torch.as_tensor(vector(d), dtype=torch.float64, device=d),
])
def test_what_a_gpu_allows_is_the_same_there_and_waits_for_nothing(gpu, allowed):
    there = allowed(DEVICE)
    assert there.device == DEVICE and there.is_cuda and not gpu.waits
    assert torch.equal(there.cpu(), allowed(CPU))


@pytest.mark.parametrize("wait, name", [
    (lambda x: x.sum().item(), "_local_scalar_dense"),
    (lambda x: float(x[0]), "_local_scalar_dense"),
    (lambda x: bool(x[0] > 0), "_local_scalar_dense"),
    (lambda x: x.tolist(), "tolist"),
    (lambda x: x.nonzero(), "nonzero"),
    (lambda x: x[x > 1], "index"),
    (lambda x: x.unique(), "_unique2"),
    (lambda x: torch.linalg.inv(x.diag()), "_linalg_check_errors"),
    (lambda x: x[torch.tensor([0, 1])], "copy to the device"),
    (lambda x: x.cpu(), "copy to the host"),
    (lambda x: torch.zeros(3).copy_(x), "copy to the host"),
    (lambda x: x.copy_(torch.zeros(3)), "copy to the device"),
    (lambda x: torch.zeros(3).to(x.device, non_blocking=True), "copy to the device"),
    (lambda x: torch.tensor([1.0], device=x.device), "copy to the device"),
    (lambda x: torch.as_tensor(1.0, device=x.device), "copy to the device"),
])
def test_what_waits_for_a_gpu_is_named(gpu, wait, name):
    for mode in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
        with mode():
            x = vector()
            gpu.waits.clear()
            wait(x)
            assert gpu.waits == [name]


def test_copies_from_pinned_memory_wait_for_nothing(gpu):
    there = torch.ones(3).pin_memory().to(DEVICE, non_blocking=True)
    box = torch.zeros(3, pin_memory=True)
    box.copy_(there, non_blocking=True)
    assert box.tolist() == [1, 1, 1] and not gpu.waits


# ----------------------------------------------------------------------------------------- training


@pytest.mark.long
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("precond", PRECONDITIONERS)
@pytest.mark.parametrize("arch", [
    pytest.param(arch, marks=[pytest.mark.slow] * (arch != "ddpmpp")) for arch in ARCHITECTURES])
def test_no_loss_mixes_devices_or_reads_a_value_on_the_host(gpu, arch, precond, precision):
    net = network(arch=arch, precond=precond, precision=precision, D=128)
    clean, labels, pipe = images(BATCH, 3, SIDE, SIDE), one_hot(), AugmentPipe.standard(0.5)
    gpu.waits.clear()
    loss = LOSSES[precond](pfgmpp=True, D=128)(net, clean, labels, pipe)
    assert loss.device == DEVICE and not gpu.waits
    assert loss.shape == clean.shape and loss.isfinite().all()


@pytest.mark.long
@pytest.mark.parametrize("given", ["labels", "reference", "condition"])
@pytest.mark.parametrize("D", [math.inf, 128, 1])
def test_a_loss_there_is_the_loss_here(gpu, D, given):
    losses = []
    for device in (CPU, DEVICE):
        net = network(device, D=D, cond_channels=2 * (given == "condition")).eval()
        clean, labels = images(BATCH, 3, SIDE, SIDE, device=device), one_hot(device)
        rng = torch.Generator(device).manual_seed(0)
        others = one_hot(device).repeat(2, 1)
        also = {"reference": {"reference": images(8, 3, SIDE, SIDE, device=device),
                              "reference_labels": others},
                "condition": {"condition": images(BATCH, 2, SIDE, SIDE, device=device)}}
        gpu.waits.clear()
        loss_fn = LOSSES["edm"](pfgmpp=math.isfinite(D), D=D)
        pipe = None if given == "reference" else AugmentPipe.standard(0.5)
        draws = loss_fn.draw([2 * BATCH, *clean.shape[1:]], rng, pipe)[BATCH:]
        losses.append(loss_fn(net, clean, labels, pipe, draws=draws, **also.get(given, {})))
        assert not gpu.waits
    assert torch.equal(losses[1].detach().cpu(), losses[0])


def arrays_with_conditions(path):
    rng = np.random.default_rng(0)
    for name, i in itertools.product(("x", "cond/x"), range(12)):
        file = path / f"{name}{i:02d}.npy"
        file.parent.mkdir(exist_ok=True, parents=True)
        np.save(file, rng.integers(0, 60000, [2, 8, 12]).astype(np.uint16))
    return path


@pytest.mark.long
@pytest.mark.parametrize("options", [
    {"data_on_device": "1", "xflip": True, "cres": (1, 2)},
    {"arch": "ddpmpp", "precond": "vp", "pfgmpp": True, "aug_dim": 1.0, "batch_gpu": 4},
    {"arch": "adm", "cbase": 32, "precond": "ve", "cond": True, "label_dropout": 0.3},
    {"stf": True, "rbatch": 16, "augment": 0.0, "pfgmpp": True, "precision": "tf32"},
    {"stf": True, "rbatch": 16, "augment": 0.0, "cond": True, "data_on_device": "1"},
    {"precision": "bf16", "lsun": True, "clip_grad": 0.5},
    {"checkpoint_blocks": True, "dropout": 0.3},
    {"precision": "fp16", "clip_grad": 0.5},
    {"precision": "fp16", "ls": 100.0, "augment": 0.0},
    {"cond_image": True},
    {"cond_image": True, "data_on_device": "1"},
], ids=lambda options: ",".join(options))
def test_a_training_step_there_is_the_step_here_and_waits_for_nothing(gpu, tmp_path, options):
    cond_image = options.get("cond_image", False)
    path = arrays_with_conditions(tmp_path) if cond_image else write_dataset(tmp_path / "data.zip")
    config = TrainConfig(data=str(path), **{
        "arch": "ncsnpp", "cbase": 8, "cres": (1,), "nblock": 1, "batch": 8, "workers": 0,
        "lr_rampup": 0, "data_on_device": "0"} | options)
    found = []
    for device in (CPU, DEVICE):
        dataset = ImageFolderDataset(path, cache=True, use_labels=config.cond, xflip=config.xflip,
                                     use_conditions=cond_image)
        forget()
        trainer = Trainer(config, dataset, device)
        trainer.start()
        trainer.train_step()
        gpu.waits.clear()
        trainer.train_step()
        assert not trainer.seems_diverged()
        assert not gpu.waits
        trainer.check_divergence()
        assert trainer.dynamic_scale or trainer.counters["bad_total"].cpu() == 0
        found.append([x.detach().cpu() for net in (trainer.net, trainer.ema)
                      for x in net.state_dict().values()])
    same = [torch.equal(here, there) for here, there in zip(*found, strict=True)]
    assert all(same) or config.precision == "fp16"  # here it is fp32


@pytest.mark.slow
@pytest.mark.long
def test_a_run_there_writes_what_a_run_here_writes_and_goes_on_alike(gpu, dataset_zip, tmp_path):
    config = TrainConfig(
        data=str(dataset_zip), arch="ncsnpp", cbase=8, cres=(1,), nblock=1, batch=8, workers=0,
        duration=8e-6, samples=1, eval=1.0, eval_num=2, eval_ref=str(dataset_zip),
        eval_detector="pixels", data_on_device="1", compile="0")
    written = []
    for device in (CPU, DEVICE):
        forget()
        run_dir = tmp_path / device.type
        run_dir.mkdir()
        dataset = ImageFolderDataset(dataset_zip, cache=True)
        training_loop(config, dataset=dataset, run_dir=run_dir, device=device)
        [path] = run_dir.glob("training-state-0*.pt")
        state = checkpoint.load(path)
        states = [checkpoint.digest(state[part]) for part in ("net", "ema", "optimizer")]
        trainer = Trainer(config, dataset, device)
        restore_(trainer, State(path.name, state))
        trainer.start()
        trainer.train_step()
        state = trainer.state()
        states += [checkpoint.digest(state[part]) for part in ("net", "ema", "optimizer")]
        *_, last = (run_dir / "stats.jsonl").read_text().splitlines()
        written.append((
            sorted(file.name for file in run_dir.iterdir()),
            [file.read_bytes() for file in sorted(run_dir.glob("*.png"))],
            [json.loads(last)[name]["mean"] for name in ("Loss/loss", METRIC)], states))
    assert written[0] == written[1]


@pytest.mark.parametrize("patch", [None, 3])
@pytest.mark.parametrize("arrays", [False, True])
def test_batches_of_data_that_are_there_wait_for_nothing(gpu, tmp_path, arrays, patch):
    path = arrays_with_conditions(tmp_path) if arrays else write_dataset(tmp_path / "a.zip", num=12)
    dataset = ImageFolderDataset(path, cache=True, xflip=True, use_labels=not arrays,
                                 use_conditions=arrays, patch=patch)
    data = DeviceData(dataset, DEVICE)
    gpu.waits.clear()
    found = data.get_batch([3, 14, 0])
    assert not gpu.waits
    for there, here in zip(found, dataset.get_batch([3, 14, 0]), strict=True):
        assert there.device == DEVICE and np.array_equal(there.cpu().numpy(), here)


# ----------------------------------------------------------------------------------------- sampling


class Shrinking:
    """The ideal denoiser of standard normal images, and so a network of few operations."""

    sigma_min, sigma_max, image_shape, label_dim = 0.002, 80.0, (3, SIDE, SIDE), 0

    def __init__(self, D):
        self.D = D

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def __call__(self, x, sigma, class_labels=None):
        return x / (1 + sigma**2)


class Watched:
    """A denoiser that notes the waits between its first evaluation and the end."""

    def __init__(self, net, gpu):
        self.net, self.gpu, self.is_new = net, gpu, True

    def __getattr__(self, name):
        return getattr(self.net, name)

    def __call__(self, *args, **kwargs):
        if self.is_new:
            self.gpu.waits.clear()
        self.is_new = False
        return self.net(*args, **kwargs)


def sample(net, gpu, device, sampler, **kwargs):
    """Returns the images of two seeds; from the first evaluation on, nothing waits for it."""
    watched = Watched(net, gpu)
    found = list(generate_images(watched, [[5, 6]], sampler=sampler, device=device, **kwargs))
    assert not gpu.waits and not watched.is_new
    [batch] = found
    assert batch.images.device == device
    return batch.images.cpu()


CHURN = {"S_churn": 2.0, "S_min": 0.1, "S_max": 50.0, "noise_alpha": 0.1}


@pytest.mark.parametrize("D", [math.inf, 128, 1])
@pytest.mark.parametrize("settings", [
    {}, CHURN, *({"solver": solver} for solver in ("ipndm", "dpmpp2m", "unipc"))])
def test_the_edm_sampler_gives_the_same_images_there_and_steps_wait_for_nothing(gpu, settings, D):
    here, there = (sample(Shrinking(D), gpu, device, SamplerConfig(num_steps=3, **settings))
                   for device in (CPU, DEVICE))
    assert torch.equal(here, there)


@pytest.mark.long
@pytest.mark.parametrize("discretization, schedule, scaling, solver", [
    *itertools.product(DISCRETIZATIONS, ["linear"], ["none"], SOLVERS),
    *itertools.product(["edm"], SCHEDULES, SCALINGS, ["heun"])])
def test_nor_do_those_of_any_ablation(gpu, discretization, schedule, scaling, solver):
    for D, settings in ((math.inf, {}), (1, CHURN)):
        sampler = SamplerConfig(num_steps=2, solver=solver, discretization=discretization,
                                schedule=schedule, scaling=scaling, **settings)
        here, there = (sample(Shrinking(D), gpu, device, sampler) for device in (CPU, DEVICE))
        assert torch.equal(here, there)


@pytest.mark.parametrize("sampler", [edm_sampler, ablation_sampler])
def test_samplers_draw_by_themselves_there(gpu, sampler):
    """From PyTorch's default generators, where no other are given."""
    net = Watched(Shrinking(128), gpu)
    found = sampler(net, images(2, 3, SIDE, SIDE), num_steps=3, **CHURN)
    assert found.device == DEVICE and found.dtype == torch.float64 and not gpu.waits


@pytest.mark.long
@pytest.mark.parametrize("arch, precond, precision", [
    ("ddpmpp", "vp", "bf16"), ("ncsnpp", "ve", "tf32"), ("adm", "edm", "fp32"),
    ("ddpmpp", "edm", "fp16")])
def test_networks_sample_the_same_images_there(gpu, arch, precond, precision):
    here, there = (
        sample(network(device, arch, precond, D=128, precision=precision).eval(), gpu, device,
               SamplerConfig(num_steps=2, S_churn=1.0)) for device in (CPU, DEVICE))
    assert torch.equal(here, there) if precision != "fp16" else there.isfinite().all()


@pytest.mark.long
def test_networks_of_discrete_levels_sample_the_same_images_there(gpu):
    config = built("ddpmpp", "vp", math.inf, 0, 0.0).config
    config = {k: v for k, v in config.items() if k not in ("beta_d", "beta_min", "epsilon_t")}
    net = build_network(config | {"class_name": "iDDPMPrecond"}).eval()
    here, there = (sample(copy.deepcopy(net).to(device), gpu, device, SamplerConfig(
        num_steps=2, discretization="iddpm", S_churn=1.0)) for device in (CPU, DEVICE))
    assert torch.equal(here, there)


@pytest.mark.long
@pytest.mark.parametrize("with_guide", [False, True])
def test_guided_images_are_the_same_there(gpu, with_guide):
    found = []
    for device in (CPU, DEVICE):
        guide = network(device, "ncsnpp").eval() if with_guide else None
        net = guided(network(device).eval(), guidance=2.0, gnet=guide)
        found.append(sample(net, gpu, device, SamplerConfig(num_steps=2)))
    assert torch.equal(*found)


def test_networks_take_a_number_for_the_level_and_no_labels_there(gpu):
    with torch.no_grad():
        here, there = (network(device).eval()(images(2, 3, SIDE, SIDE, device=device), 0.5)
                       for device in (CPU, DEVICE))
    assert torch.equal(here, there.cpu())


def test_guidance_in_an_interval_is_the_same_there(gpu):
    """It reads the levels, as it says."""
    found = []
    for device in (CPU, DEVICE):
        net = guided(network(device, augment=0.0).eval(), guidance=2.0, interval=(0.1, 1.0))
        with torch.no_grad():
            levels = torch.tensor([0.05, 0.5, 0.7, 2.0])
            found.append(net(images(BATCH, 3, SIDE, SIDE, device=device), levels.to(device),
                             one_hot(device)).cpu())
    assert torch.equal(*found)


@pytest.mark.long
def test_conditions_and_first_images_are_brought_there(gpu):
    found = []
    for device in (CPU, DEVICE):
        net = network(device, cond_channels=2).eval()
        found.append(sample(
            net, gpu, device, SamplerConfig(num_steps=2, sigma_max=2.0), class_idx=1,
            conditions=lambda seeds: images(len(seeds), 2, SIDE, SIDE, device=CPU),
            inits=lambda seeds: images(len(seeds), 3, SIDE, SIDE, device=CPU)))
    assert torch.equal(*found)


def test_trajectories_come_back_from_there(gpu):
    here, there = (trajectory(Shrinking(1), [1, 2], sampler=SamplerConfig(num_steps=3, **settings),
                              device=device)
                   for settings in [CHURN] for device in (CPU, DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_draws_of_seeds_are_the_same_there(gpu):
    found = []
    for device in (CPU, DEVICE):
        latents, labels, rnd = draw_latents(network(device, D=1), [3, 4], device)
        state = latents[:, :1]
        scale = rnd.posterior_scale(PerturbationKernel(1), state, torch.tensor(2.0, device=device))
        values = (latents, labels, scale, rnd.randn_like(state))
        assert all(x.device == device for x in values)
        found.append([x.cpu() for x in values])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("D", [math.inf, 128, 1])
def test_noise_and_its_density_are_the_same_there(gpu, D):
    kernel, found = PerturbationKernel(D), []
    for device in (CPU, DEVICE):
        noise = kernel.sample([4, 3], 2.0, torch.Generator(device).manual_seed(0))
        found.append((noise.cpu(), kernel.log_density(noise, 2.0).cpu()))
    assert all(map(torch.equal, *found))


@pytest.mark.long
def test_a_network_from_a_file_samples_the_same_images_there(gpu, tmp_path):
    for name, arch in (("net", "ddpmpp"), ("guide", "ncsnpp")):
        net = built(arch, "edm", 128, 0, 0.0)
        checkpoint.save(tmp_path / f"{name}.pt", {
            "format": checkpoint.SNAPSHOT_FORMAT, "network": net.config,
            "ema": dict(net.state_dict()), "progress": {"cur_nimg": 0}, "options": {}})
    found = []
    for device in (CPU, DEVICE):
        sampler = NetworkSampler.open(
            str(tmp_path / "net.pt"), device, num_steps=3, bits=6, rounding_seed=0, guidance=2.0,
            gnet=str(tmp_path / "guide.pt"), guidance_interval=(0.1, 10.0))
        [batch] = sampler.images([[1, 2]])
        found.append(to_uint8(batch.images).cpu())
    assert torch.equal(*found)


@pytest.mark.long
def test_a_loaded_network_gives_the_same_there_and_on_the_cpu(gpu, tmp_path, monkeypatch):
    net = built("ddpmpp", "edm", 128, 0, 0.0)
    checkpoint.save(tmp_path / "net.pt", {
        "format": checkpoint.SNAPSHOT_FORMAT, "network": net.config, "ema": dict(net.state_dict()),
        "progress": {"cur_nimg": 0}, "options": {}})
    pixels = np.random.default_rng(0).integers(0, 256, [2, 3, SIDE, SIDE], np.uint8)
    found = []
    for device in (CPU, DEVICE):
        monkeypatch.setattr("metrics.model._device", lambda _, device=device: device)
        model = load(tmp_path / "net.pt")
        samples = model.sample(3, steps=3)
        restored = model.restore(pixels, measure="inpaint", mask=np.eye(SIDE), sigma=0, steps=2,
                                 labels=[0, 1])
        latents = model.encode(pixels, steps=2, labels=[0, 1])
        again = model.sample(latents=latents, steps=2)
        values = model.likelihood(pixels, [0, 1], steps=2).values
        assert samples.images.device == latents.latents.device == CPU
        found.append([*(some.data() for some in (samples, restored, again)), torch.tensor(values)])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there.double(), here.double(), rtol=1e-4, atol=1)


# ------------------------------------------------------------------------------------------ scoring


def test_images_are_resized_the_same_there(gpu):
    x = images(2, 3, 5, 7)
    gpu.waits.clear()
    there = inception.resize(x, 11)
    assert not gpu.waits
    assert torch.equal(there.cpu(), inception.resize(x.cpu(), 11))


@pytest.mark.long
def test_inception_gives_the_same_features_there(gpu):
    rng = torch.Generator().manual_seed(0)
    state = {name: torch.rand(shape, generator=rng) / math.prod(shape[1:])
             for name, shape in inception.state_shapes().items()}
    pixels = torch.randint(256, [1, 3, SIDE, SIDE], generator=rng, dtype=torch.uint8)
    here, there = (inception.InceptionV3(state, device) for device in (CPU, DEVICE))
    gpu.waits.clear()
    features = there(pixels)
    logits = there.logits(features)
    assert features.device == logits.device == DEVICE and gpu.waits == ["copy to the device"]
    expected = here(pixels)
    assert torch.equal(features.cpu(), expected)
    assert torch.equal(logits.cpu(), here.logits(expected))
    assert there(pixels[:0]).device == DEVICE


@pytest.mark.long
def test_dinov2_gives_the_same_features_there(gpu, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=518, patch_size=14,
    )).save_pretrained(tmp_path)
    pixels = torch.randint(256, [1, 3, SIDE, SIDE], dtype=torch.uint8)
    here, there = (build_detector(f"dinov2:{tmp_path}", device) for device in (CPU, DEVICE))
    gpu.waits.clear()
    features = there(pixels)
    assert features.device == DEVICE and gpu.waits == ["copy to the device"]
    torch.testing.assert_close(features.cpu(), here(pixels))
    assert there(pixels[:0]).device == DEVICE


def test_moments_are_summed_there_and_wait_for_nothing(gpu):
    found = []
    for device in (CPU, DEVICE):
        parts = images(3, 10, 6, device=device)
        statistics = FeatureStatistics()
        gpu.waits.clear()
        for part in parts:
            statistics.append(part)
        assert not gpu.waits
        statistics.all_reduce()
        assert statistics.mean().device == statistics.cov().device == device
        found.append((statistics.mean().cpu(), statistics.cov().cpu()))
    assert all(map(torch.equal, *found))
    assert frechet_distance(*found[0], statistics.mean(), statistics.cov()) < 1e-9


def test_class_statistics_take_logits_from_there(gpu):
    scores = []
    for device in (CPU, DEVICE):
        classes = ClassStatistics(20)
        classes.append(images(20, 5, device=device), range(20))
        classes.all_reduce()
        scores.append(classes.score())
    assert scores[0] == scores[1]


def test_distances_of_features_that_are_there_are_the_same(gpu):
    x, y = images(30, 6), images(40, 6) * 1.1
    assert kernel_distance(x.cpu(), y.cpu(), subsets=3, size=9) == kernel_distance(
        x, y, subsets=3, size=9)
    assert precision_recall(x.cpu(), y.cpu()) == precision_recall(x.cpu(), y.cpu(), device=DEVICE)
    assert density_coverage(x.cpu(), y.cpu()) == density_coverage(x.cpu(), y.cpu(), device=DEVICE)
    here, there = (nearest_neighbours(x.cpu(), y.cpu(), 2, device=device)
                   for device in (CPU, DEVICE))
    assert (here.numbers == there.numbers).all() and (here.distances == there.distances).all()


def test_intervals_and_scores_of_classes_are_the_same(gpu):
    x, y, classes = images(30, 6).cpu(), images(30, 6).cpu() * 1.1, [0, 1, 1] * 10
    here, there = (bootstrap_frechet(x, y.mean(0), torch.cov(y.T), draws=40, device=device)
                   for device in (CPU, DEVICE))
    assert here == there
    scores = [scores_by_class(x, classes, y, classes, Pixels(device), ["fid", "kid", "pr", "dc"])
              for device in (CPU, DEVICE)]
    assert scores[0] == scores[1]


def test_scored_images_are_collected_there(gpu):
    features = []
    for device in (CPU, DEVICE):
        pixels = (images(20, 3, 4, 4, device=device) * 50 + 128).clamp(0, 255).to(torch.uint8)
        batches = [(part, range(k * 10, k * 10 + 10)) for k, part in enumerate(pixels.split(10))]
        features.append(collect(batches, image_shape=(3, 4, 4), count=20, detector=Pixels(device),
                                metrics=["fid", "kid", "pr"]))
    here, there = features
    assert torch.equal(here.features, there.features)
    assert torch.equal(here.moments.cov(), there.moments.cov().cpu())
