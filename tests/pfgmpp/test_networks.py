"""Preconditioners against their table, U-Nets against numpy, names and sizes as published."""

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.signal
import scipy.special
import scipy.stats
import torch

from pfgmpp.networks import (
    EDMPrecond,
    VEPrecond,
    VPPrecond,
    build_network,
    iDDPMPrecond,
    known_levels,
)
from pfgmpp.unets import (
    Conv2d,
    DhariwalUNet,
    FourierEmbedding,
    PositionalEmbedding,
    SongUNet,
    UNetBlock,
)
from training.config import TrainConfig

INF = math.inf
PRECONDS = (EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond)

# Every part of each architecture at 8x8: two levels, attention, labels, augmentation.
SONG = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
        "attn_resolutions": [4], "augment_dim": 9, "dropout": 0.0}
NETWORKS = {
    "ddpmpp": SONG,
    "ncsnpp": {**SONG, "embedding_type": "fourier", "encoder_type": "residual",
               "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]},
    "skip": {**SONG, "encoder_type": "skip", "decoder_type": "skip"},
    "adm": {"model_type": "DhariwalUNet", "model_channels": 64, "channel_mult": [1, 2],
            "num_blocks": 1, "attn_resolutions": [4], "augment_dim": 9, "dropout": 0.0},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def network(arch="ddpmpp", cls=EDMPrecond, label_dim=4, randomise=True, **kwargs):
    torch.manual_seed(0)
    net = cls(8, 3, label_dim=label_dim, **{**NETWORKS[arch], **kwargs}).eval()
    if randomise:  # initial weights are zero or 1e-5 in places, which hides whole branches
        with torch.no_grad():
            for name, p in net.named_parameters():
                if p.ndim > 1:
                    p.copy_(torch.randn(p.shape) / math.sqrt(p[0].numel()))
                else:
                    p.copy_(0.1 * torch.randn(p.shape) + ("norm" in name and "weight" in name))
    return net


class Stub(torch.nn.Module):
    """Stands in for F: keeps what it is given, returns what it is told."""

    def __init__(self, output):
        super().__init__()
        self.output, self.calls = output, []

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None, **kwargs):
        self.calls.append((x, noise_labels, class_labels, augment_labels))
        return self.output.to(x.dtype)


def stubbed(cls, label_dim=0, channels=3, **kwargs):
    net = network(cls=cls, label_dim=label_dim, randomise=False, **kwargs)
    output = randn(4, channels * (2 if cls is iDDPMPrecond else 1), 8, 8, seed=9)
    net.model = Stub(output)
    return net, net.model


# ---- preconditioners ----------------------------------------------------------------------------

def iddpm_levels(M=1000, C_1=0.001, C_2=0.008):
    def alpha_bar(j):
        return math.sin(math.pi / 2 * j / M / (C_2 + 1)) ** 2
    u = [0.0]
    for j in range(M, 0, -1):
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), C_1) - 1))
    return np.array(u[::-1])


def vp_time(s, beta_d=19.9, beta_min=0.1):
    """Solves exp(beta_d t^2/2 + beta_min t) - 1 = s^2 by numpy's polynomial roots."""
    return max(np.roots([beta_d / 2, beta_min, -math.log1p(s**2)]).real)


TABLE = {  # c_skip, c_out, c_in, c_noise
    EDMPrecond: lambda s: (0.25 / (s**2 + 0.25), s * 0.5 / math.sqrt(s**2 + 0.25),
                           1 / math.sqrt(0.25 + s**2), math.log(s) / 4),
    VPPrecond: lambda s: (1, -s, 1 / math.sqrt(s**2 + 1), 999 * vp_time(s)),
    VEPrecond: lambda s: (1, s, 1, math.log(s / 2)),
    iDDPMPrecond: lambda s: (1, -s, 1 / math.sqrt(s**2 + 1),
                             999 - np.abs(iddpm_levels() - s).argmin()),
}


@pytest.mark.parametrize("cls", PRECONDS)
def test_coefficients_are_those_of_the_table(cls):
    sigma = [0.1, 0.5, 2.0, 70.0]
    x = randn(4, 3, 8, 8)
    net, model = stubbed(cls)
    denoised = net(x, torch.tensor(sigma))
    (inner, c_noise, *_), = model.calls
    for i, s in enumerate(sigma):
        c_skip, c_out, c_in, noise = TABLE[cls](s)
        # Float32 at size 70: 70 * 6e-8, and the VP time loses digits at small sigma.
        torch.testing.assert_close(inner[i], c_in * x[i], rtol=1e-6, atol=0)
        assert c_noise.flatten()[i].item() == pytest.approx(noise, rel=2e-5)
        torch.testing.assert_close(denoised[i], c_skip * x[i] + c_out * model.output[i, :3],
                                   rtol=1e-5, atol=3e-5)


def test_edm_coefficients_follow_sigma_data():
    net, model = stubbed(EDMPrecond, sigma_data=2.0)
    x = randn(4, 3, 8, 8)
    denoised = net(x, 2.0)
    # At sigma = sigma_data: half the input, and output and input by sqrt(1/2)*2 and 1/sqrt(8).
    torch.testing.assert_close(model.calls[0][0], x / math.sqrt(8))
    torch.testing.assert_close(denoised, x / 2 + math.sqrt(2) * model.output)


def test_edm_target_and_input_have_unit_variance_at_every_sigma():
    # What the coefficients are made for: F sees and must return unit variance for data of
    # standard deviation sigma_data. The target is (y - c_skip x) / c_out.
    rng = np.random.default_rng(0)
    y, z = rng.normal(size=[2, 200_000])
    for sigma in (0.02, 0.5, 5.0):
        c_skip, c_out, c_in, _ = TABLE[EDMPrecond](sigma)
        net, model = stubbed(EDMPrecond)
        model.output = torch.zeros(1, 3, 8, 8)
        assert net(torch.ones(1, 3, 8, 8), sigma).mean().item() == pytest.approx(c_skip, rel=1e-6)
        x = 0.5 * y + sigma * z
        assert np.std(c_in * x) == pytest.approx(1, abs=0.01)
        assert np.std((0.5 * y - c_skip * x) / c_out) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("cls", PRECONDS)
def test_sigma_counts_by_value_whatever_its_shape_and_dtype(cls):
    x = randn(4, 3, 8, 8)
    net = network(cls=cls, label_dim=0)
    with torch.no_grad():
        expected = net(x, torch.full([4], 2.0))
        for dtype in (torch.float16, torch.float32, torch.float64, torch.int64):
            for shape in ([], [4], [4, 1, 1, 1]):
                sigma = torch.full(shape, 2, dtype=dtype)
                torch.testing.assert_close(net(x, sigma), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(net(x, 2.0), expected, rtol=1e-5, atol=1e-5)
        assert (net(x, 0.5) - expected).abs().max() > 0.01


@pytest.mark.parametrize("cls", PRECONDS)
def test_output_is_float32_for_every_dtype_of_input(cls):
    net = network(cls=cls, label_dim=0)
    x = randn(2, 3, 8, 8)
    with torch.no_grad():
        wide = net(x.double(), torch.tensor([1.0, 2.0], dtype=torch.float64))
        assert wide.dtype == torch.float32
        assert torch.equal(wide, net(x, torch.tensor([1.0, 2.0])))


@pytest.mark.parametrize("arch", NETWORKS)
def test_missing_labels_are_zeros(arch):
    net, x = network(arch), randn(2, 3, 8, 8)
    with torch.no_grad():
        bare = net(x, 1.0)
        zeros = net(x, 1.0, torch.zeros(2, 4), False, torch.zeros(2, 9))
        torch.testing.assert_close(bare, zeros, rtol=1e-5, atol=1e-5)  # float32 rounding
        for labels, augment in [(torch.eye(4)[:2], None), (None, randn(2, 9))]:
            changed = net(x, 1.0, labels, augment_labels=augment)
            assert (changed - bare).abs().max() > 1e-2


def test_fourth_positional_argument_is_force_fp32():
    net, model = stubbed(EDMPrecond)
    net.compute_dtype = torch.bfloat16
    x = randn(4, 3, 8, 8)
    assert net(x, 1.0, None).dtype == torch.float32
    net(x, 1.0, None, True)
    net(x, 1.0, force_fp32=True)
    assert [call[0].dtype for call in model.calls] == [torch.bfloat16, *[torch.float32] * 2]


def test_half_precision_networks_compute_in_float32_on_the_cpu():
    net, model = stubbed(EDMPrecond, use_fp16=True)
    x = randn(4, 3, 8, 8)
    denoised = net(x, 1.0)
    assert [call[0].dtype for call in model.calls] == [torch.float32] and net.use_fp16
    plain, _ = stubbed(EDMPrecond)
    assert torch.equal(denoised, plain(x, 1.0))


def test_use_fp16_switches_half_precision_on_and_off():
    net, _ = stubbed(EDMPrecond)
    for value in (True, False, True):
        net.use_fp16 = value
        assert net.use_fp16 is value and net.config["use_fp16"] is value
        assert net.compute_dtype == (torch.float16 if value else torch.float32)


def test_labels_and_augment_labels_reach_the_model():
    net, model = stubbed(EDMPrecond, label_dim=4)
    labels, augment = randn(4, 4), randn(4, 9, seed=1)
    net(randn(4, 3, 8, 8), 1.0, labels, False, augment)
    _, _, seen, seen_augment = model.calls[0]
    assert torch.equal(seen, labels) and torch.equal(seen_augment, augment)


@pytest.mark.parametrize("cls, low, high", [
    (EDMPrecond, 0, INF), (VEPrecond, 0.02, 100), (VPPrecond, 0.0009765625, 152.16697692871094),
    (iDDPMPrecond, 0.006422337144613266, 20291.171875)])
def test_sigma_ranges_are_the_published_ones(cls, low, high):
    net = network(cls=cls, randomise=False)
    # The published numbers came from one machine's float32 sine and exponential. A last digit of
    # abar, 6e-8, moves u_0^2 ~ 1/abar(1) by twice as much, and small levels by up to 1e-5.
    assert net.sigma_min == pytest.approx(low, rel=1e-5)
    assert net.sigma_max == pytest.approx(high, rel=1e-5)


@pytest.mark.parametrize("cls, changes", [
    (EDMPrecond, {}), (EDMPrecond, {"sigma_min": 0.05, "sigma_max": 50.0}), (VEPrecond, {}),
    (VEPrecond, {"sigma_max": 50.0}), (VPPrecond, {}), (VPPrecond, {"beta_d": 9.0}),
    (VPPrecond, {"beta_min": 0.2, "epsilon_t": 1e-3})], ids=str)
def test_a_configuration_tells_the_levels_that_its_network_knows(cls, changes):
    net = network(cls=cls, randomise=False, **changes)
    for config in (net.config, {"class_name": cls.__name__, **changes}):
        assert known_levels(config) == (net.sigma_min, net.sigma_max)


def test_published_levels_do_not_depend_on_the_float32_functions_of_the_machine(monkeypatch):
    vp, iddpm = (network(cls=cls, randomise=False) for cls in (VPPrecond, iDDPMPrecond))
    for name in ("sin", "exp"):
        exact = getattr(torch, name)

        def off_in_float32(x, exact=exact):
            return exact(x) * (1 + 1e-6 * (x.dtype == torch.float32))

        monkeypatch.setattr(torch, name, off_in_float32)
        monkeypatch.setattr(torch.Tensor, name, off_in_float32)
    assert torch.exp(torch.ones(1)) > exact(torch.ones(1))  # the machine is another one now
    assert network(cls=VPPrecond, randomise=False).sigma_min == vp.sigma_min
    assert network(cls=VPPrecond, randomise=False).sigma_max == vp.sigma_max
    assert torch.equal(network(cls=iDDPMPrecond, randomise=False).u, iddpm.u)


def test_vp_and_iddpm_ranges_agree_with_their_schedules():
    net = network(cls=VPPrecond, randomise=False)
    assert net.sigma_max == pytest.approx(math.sqrt(math.exp(19.9 / 2 + 0.1) - 1), rel=1e-6)
    # Near t = 0, exp(...) - 1 has one significant digit left in float32.
    assert net.sigma_min == pytest.approx(math.sqrt(math.expm1(0.1 * 1e-5)), rel=0.05)
    u, levels = network(cls=iDDPMPrecond, randomise=False).u.numpy(), iddpm_levels()
    np.testing.assert_allclose(u, levels, rtol=1e-3)  # float32 cancellation at the low end
    assert len(u) == 1001 and u[-1] == 0


def test_round_sigma_snaps_to_the_nearest_iddpm_level():
    net = network(cls=iDDPMPrecond, randomise=False)
    u = net.u.double().numpy()
    for dtype in (torch.float32, torch.float64):
        sigma = torch.tensor([0.0, 0.001, 0.0065, 0.3, 3.3, 79.0, 1e6], dtype=dtype)
        rounded = net.round_sigma(sigma)
        assert rounded.dtype == dtype
        nearest = u[np.abs(u - sigma.double().numpy()[:, None]).argmin(1)]
        np.testing.assert_array_equal(rounded.double(), nearest)
    assert torch.equal(net.round_sigma(rounded), rounded)


@pytest.mark.parametrize("cls", [EDMPrecond, VPPrecond, VEPrecond])
def test_round_sigma_is_the_identity_elsewhere(cls):
    net = network(cls=cls, randomise=False)
    sigma = torch.tensor([0.0021, 0.3, 80.123], dtype=torch.float64)
    assert torch.equal(net.round_sigma(sigma), sigma)
    assert float(net.round_sigma(0.3)) == pytest.approx(0.3)


@pytest.mark.parametrize("cls", [EDMPrecond, VEPrecond])
@pytest.mark.parametrize("D", [1, 2, 128, INF])
def test_D_is_inf_unless_the_network_is_pfgmpp(cls, D):
    assert network(cls=cls, randomise=False, pfgmpp=False, D=D).D == INF
    assert network(cls=cls, randomise=False, pfgmpp=True, D=D).D == D
    assert network(cls=cls, randomise=False).N == 3 * 8 * 8


# ---- names and sizes ----------------------------------------------------------------------------

def full_size(arch, side, label_dim=0, **options):
    config = TrainConfig(data="data.zip", arch=arch, cond=label_dim > 0, **options)
    with torch.device("meta"):
        return build_network(config.network(side, 3, label_dim))


@pytest.mark.long
@pytest.mark.parametrize("arch, side, options, label_dim, millions", [
    ("ncsnpp", 32, {}, 0, 56.40),
    ("ddpmpp", 32, {}, 0, 55.73),
    ("ddpmpp", 64, {"cres": (1, 2, 2, 2)}, 0, 61.81),
    ("ncsnpp", 64, {"cres": (1, 2, 2, 2)}, 0, 62.76),
    ("adm", 64, {"augment": 0}, 1000, 295.9)])
def test_parameter_counts_are_the_published_ones(arch, side, options, label_dim, millions):
    net = full_size(arch, side, label_dim, **options)
    count = sum(p.numel() for p in net.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.05 if millions > 100 else 0.005)


def shapes(net):
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


def test_ddpmpp_has_the_published_state_dict_keys():
    keys = shapes(full_size("ddpmpp", 32))
    assert keys["model.map_layer0.weight"] == (512, 128)
    assert keys["model.map_augment.weight"] == (512 // 4, 9)
    assert "model.map_augment.bias" not in keys
    assert keys["model.enc.32x32_conv.weight"] == (128, 3, 3, 3)
    assert keys["model.enc.32x32_block0.norm0.weight"] == (128,)
    assert keys["model.enc.16x16_block3.qkv.weight"] == (768, 256, 1, 1)
    assert keys["model.enc.16x16_down.conv0.resample_filter"] == (1, 1, 2, 2)
    assert keys["model.enc.16x16_down.skip.weight"] == (256, 256, 1, 1)
    assert keys["model.dec.8x8_in0.qkv.weight"] == (768, 256, 1, 1)
    assert keys["model.dec.32x32_block4.conv1.weight"] == (256, 256, 3, 3)
    assert keys["model.dec.32x32_aux_norm.weight"] == (256,)
    assert keys["model.dec.32x32_aux_conv.weight"] == (3, 256, 3, 3)
    attention = {key.split(".")[2] for key in keys if key.startswith("model.dec.") and "qkv" in key}
    assert attention == {"8x8_in0", "16x16_block4"}
    attention = {key.split(".")[2] for key in keys if key.startswith("model.enc.") and "qkv" in key}
    assert attention == {f"16x16_block{i}" for i in range(4)}
    assert not any("in1.qkv" in key or "aux_residual" in key or "freqs" in key for key in keys)


def test_ncsnpp_has_the_published_state_dict_keys():
    keys = shapes(full_size("ncsnpp", 32))
    assert keys["model.map_noise.freqs"] == (128,)
    assert keys["model.map_layer0.weight"] == (512, 256)
    assert keys["model.enc.16x16_aux_residual.weight"] == (256, 3, 3, 3)
    assert keys["model.enc.8x8_aux_residual.weight"] == (256, 256, 3, 3)
    assert keys["model.enc.16x16_aux_residual.resample_filter"] == (1, 1, 4, 4)
    assert keys["model.dec.16x16_up.conv0.resample_filter"] == (1, 1, 4, 4)
    assert not any("aux_skip" in key or "aux_down" in key for key in keys)


def test_adm_has_the_published_state_dict_keys():
    keys = shapes(full_size("adm", 64, 1000, augment=0))
    assert keys["model.map_layer0.weight"] == (768, 192)
    assert keys["model.map_label.weight"] == (768, 1000)
    assert "model.map_label.bias" not in keys and "model.map_augment.weight" not in keys
    assert keys["model.enc.64x64_conv.weight"] == (192, 3, 3, 3)
    assert keys["model.enc.32x32_block0.affine.weight"] == (2 * 384, 768)
    assert keys["model.enc.32x32_down.skip.resample_filter"] == (1, 1, 2, 2)
    assert "model.enc.32x32_down.skip.weight" not in keys
    assert keys["model.out_norm.weight"] == (192,)
    assert keys["model.out_conv.weight"] == (3, 192, 3, 3)
    attention = {key.split(".")[2] for key in keys if "dec." in key and "qkv" in key}
    assert attention == {"8x8_in0", *(f"{r}x{r}_block{i}" for r in (8, 16, 32) for i in range(4))}


# ---- sizes and channels -------------------------------------------------------------------------

def sized(size, arch="ddpmpp", cls=EDMPrecond, channels=3, **kwargs):
    torch.manual_seed(0)
    options = {**NETWORKS[arch], "attn_resolutions": [], **kwargs}
    net = cls(size, channels, label_dim=4, **options).eval().requires_grad_(False)
    for p in net.parameters():
        p.add_(0.1 * torch.randn(p.shape))
    return net


@pytest.mark.long
@pytest.mark.parametrize("attend", [[], [8], [16, 8]], ids=str)
@pytest.mark.parametrize("arch", NETWORKS)
def test_height_and_width_are_treated_alike(arch, attend):
    # The network of turned images is the same network with turned filters, under turned names.
    wide, tall = (sized(size, arch, attn_resolutions=attend) for size in ([8, 16], [16, 8]))
    turned = {}
    for name, value in wide.state_dict().items():
        for h, w in ((8, 16), (4, 8)):
            name = name.replace(f".{h}x{w}_", f".{w}x{h}_")
        turned[name] = value.transpose(2, 3) if value.ndim == 4 else value
    tall.load_state_dict(turned, strict=True)
    x, labels, augment = randn(2, 3, 8, 16), randn(2, 4, seed=1), randn(2, 9, seed=2)
    sigma = torch.tensor([0.3, 4.0])
    expected = wide(x, sigma, labels, augment_labels=augment)
    result = tall(x.transpose(2, 3), sigma, labels, augment_labels=augment).transpose(2, 3)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)  # sums in another order
    assert wide.image_shape == (3, 8, 16) and wide.N == 3 * 8 * 16
    assert {name.split(".")[2].split("_")[0] for name in wide.state_dict() if ".enc." in name} == {
        "8x16", "4x8"}


@pytest.mark.parametrize("cls", PRECONDS)
def test_two_equal_sides_are_one(cls):
    one, two = sized(8, cls=cls), sized([8, 8], cls=cls)
    assert one.config == two.config and two.config["img_resolution"] == 8
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.image_shape == two.image_shape == (3, 8, 8)


@pytest.mark.parametrize("arch", ["ddpmpp", "adm"])
@pytest.mark.parametrize("size", [[8, 32], [32, 8]])
def test_a_level_attends_where_its_longer_side_is_listed(arch, size):
    with torch.device("meta"):
        net = EDMPrecond(size, 3, **{**NETWORKS[arch], "attn_resolutions": [16],
                                     "channel_mult": [1, 1, 1]})
    attending = {name.split(".")[2].split("_")[0] for name in net.state_dict()
                 if "qkv" in name and "in0" not in name}
    assert attending == {f"{size[0] // 2}x{size[1] // 2}"}


def gradients_and_kept(net, x, labels, augment):
    """The gradients of a sum, and the bytes that the forward pass has kept for them."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    x = x.clone().requires_grad_()
    torch.manual_seed(7)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = net(x, torch.tensor([0.3, 4.0]), labels, augment_labels=augment)
    drawn = torch.get_rng_state()
    torch.manual_seed(99)  # what others draw before the backward pass changes nothing
    (out * randn(*out.shape, seed=3)).sum().backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return [out.detach(), x.grad, drawn], grads, sum(kept.values())


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", NETWORKS)
def test_checkpointed_blocks_have_the_same_gradients_and_keep_less(arch, dtype):
    net = sized(16, arch, num_blocks=3, dropout=0.3, label_dropout=0.5, attn_resolutions=[8])
    net.train().requires_grad_().compute_dtype = dtype
    given = randn(2, 3, 16, 16), randn(2, 4, seed=1), randn(2, 9, seed=2)
    results, grads, kept = gradients_and_kept(net, *given)
    net.zero_grad(set_to_none=True)
    before = json.dumps(net.config), list(net.state_dict())
    net.model.checkpoint_blocks = True
    checkpointed, grads_again, kept_again = gradients_and_kept(net, *given)
    assert all(torch.equal(a, b) for a, b in zip(results, checkpointed, strict=True))
    assert grads.keys() == grads_again.keys() and len(grads) > 20
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)
    parameters = sum(p.numel() * p.element_size() for p in net.parameters())
    assert kept_again - parameters < 0.5 * (kept - parameters) or kept_again < 0.4 * kept
    assert (json.dumps(net.config), list(net.state_dict())) == before, "no part of the network"


@pytest.mark.parametrize("arch", NETWORKS)
def test_blocks_are_computed_twice_where_there_are_gradients(arch):
    net = sized(8, arch)
    net.requires_grad_()
    net.model.checkpoint_blocks = True
    calls, given = [], (randn(2, 3, 8, 8), 1.0, randn(2, 4, seed=1))
    blocks = [block for block in net.modules() if isinstance(block, UNetBlock)]
    for block in blocks:
        block.norm0.register_forward_hook(lambda *_: calls.append(1))
    for mode in (net.eval, net.train):
        mode()
        with torch.no_grad():
            net(*given)
        assert len(calls) == len(blocks)
        calls.clear()
        net(*given).sum().backward()
        assert len(calls) == 2 * len(blocks)
        calls.clear()


def attending(net):
    """The longer sides of the levels that attend, the block in the middle left out."""
    return {max(map(int, name.split(".")[2].split("_")[0].split("x"))) for name in net.state_dict()
            if "qkv" in name and "in0" not in name}


@pytest.mark.long
@pytest.mark.parametrize("arch, by_default", [("ddpmpp", {16}), ("ncsnpp", {16}), ("adm", {8, 16})])
@pytest.mark.parametrize("size, ares", [
    (16, None), (16, ()), (16, (16, 4)), ([16, 8], (8,)), ([4, 16], None), ([4, 16], (16, 4))],
    ids=str)
def test_a_run_attends_where_its_options_say(arch, by_default, size, ares):
    config = TrainConfig(data="none", arch=arch, ares=ares, cbase=64, cres=(1, 1, 1), nblock=1)
    with torch.device("meta"):
        net = build_network(config.network(size, 3, 0))
    assert attending(net) == (by_default if ares is None else set(ares))
    assert any("in0.qkv" in name for name in net.state_dict()), "the middle does anyway"
    assert net.config.get("attn_resolutions") == (None if ares is None else list(ares))
    if ares:
        turned = dataclasses.replace(config, ares=ares[::-1])
        assert turned.network(size, 3, 0) == config.network(size, 3, 0), "one network, one file"


@pytest.mark.parametrize("size", [16, [16, 8], [4, 16]], ids=str)
def test_a_level_that_is_not_there_can_not_attend(size):
    config = TrainConfig(data="none", ares=(8, 32, 2), cres=(1, 1, 1))
    with pytest.raises(ValueError, match="--ares=8,32,2: .* of 32 or 2; choose from 16, 8, 4, or"):
        config.network(size, 3, 0)
    by_default = TrainConfig(data="none", ares=(2,))  # three levels
    with pytest.raises(ValueError, match="16, 8, 4"):
        by_default.network(size, 3, 0)


@pytest.mark.long
@pytest.mark.parametrize("arch", NETWORKS)
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels_is_denoised(arch, channels):
    net = sized([4, 8], arch, channels=channels)
    copy = build_network(json.loads(json.dumps(net.config))).eval()
    copy.load_state_dict(net.state_dict())
    x = randn(2, channels, 4, 8)
    with torch.no_grad():
        denoised = net(x, 1.0)
        assert denoised.shape == x.shape
        # Weights that lie otherwise in memory may be summed in another order.
        torch.testing.assert_close(copy(x, 1.0), denoised, rtol=1e-4, atol=1e-5)
        # Every channel of the input reaches every channel of the output beside its own c_skip.
        for c in range(channels):
            changed = x.clone()
            changed[:, c] += 1
            moved = (net(changed, 1.0) - denoised)
            moved[:, c] -= 0.2  # c_skip = 0.25 / 1.25
            assert (moved.abs().amax([0, 2, 3]) > 1e-4).all()


@pytest.mark.parametrize("size, words", [
    (30, ["30 can't be halved 2 times", "28 or 32"]),
    (3, ["nearest sizes are 4 ("]),
    ([30, 32], ["30x32 (height x width)", "height is 28 or 32", "width 32"]),
    ([32, 2], ["height is 32", "width 4"]),
    ([6, 10], ["height is 4 or 8", "width 8 or 12"]),
    ([8], ["img_resolution=[8]", "[height, width]"]), ([8, 8, 8], ["[height, width]"]),
    ([8, 0], ["positive whole"]), ([8, 8.0], ["positive whole"]), (0, ["positive whole"]),
], ids=str)
def test_sizes_that_do_not_work_are_refused_with_the_nearest_that_do(size, words):
    for arch in ("ddpmpp", "adm"):
        with pytest.raises(ValueError) as error:
            EDMPrecond(size, 3, **{**NETWORKS[arch], "channel_mult": [1, 1, 1]})
        assert "\n" not in str(error.value)
        assert all(word in str(error.value) for word in words), error.value


# ---- initial weights ----------------------------------------------------------------------------

def fans(weight):
    k2 = weight[0, 0].numel()
    return weight.shape[1] * k2, weight.shape[0] * k2


def is_uniform(values, bound):
    values = values.detach().flatten().numpy() / bound
    return (np.abs(values).max() <= 1 + 1e-6
            and scipy.stats.kstest(values, scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-4)


@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp"])
def test_song_weights_start_xavier_uniform_with_their_gains(arch):
    net = network(arch, randomise=False, model_channels=16)
    checked = set()
    for name, p in net.named_parameters():
        layer, kind = name.split(".")[-2:]
        if "norm" in layer:
            assert torch.equal(p, torch.full_like(p, float(kind == "weight"))), name
        elif kind == "bias":
            assert torch.equal(p, torch.zeros_like(p)), name
        else:
            gain = {"conv1": 1e-5, "proj": 1e-5, "qkv": math.sqrt(0.2)}.get(
                layer, 1e-5 if layer.endswith("aux_conv") else 1)
            fan_in, fan_out = fans(p)
            assert is_uniform(p, gain * math.sqrt(6 / (fan_in + fan_out))), name
            checked.add(layer)
    assert {"conv0", "conv1", "affine", "skip", "qkv", "proj", "map_label", "map_augment",
            "map_layer0", "map_layer1", "8x8_conv", "8x8_aux_conv"} <= checked


def test_fourier_frequencies_are_normal_with_standard_deviation_16():
    torch.manual_seed(0)
    freqs = FourierEmbedding(8192).freqs
    assert freqs.shape == (4096,)
    assert scipy.stats.kstest(freqs.numpy() / 16, "norm").pvalue > 1e-3


@pytest.mark.long
def test_adm_weights_start_lecun_uniform_with_zeros_before_the_sums():
    net = network("adm", randomise=False, label_dim=40)
    zero = ("conv1", "proj", "out_conv", "map_augment")
    checked = set()
    for name, p in net.named_parameters():
        layer, kind = name.split(".")[-2:]
        if "norm" in layer:
            assert torch.equal(p, torch.full_like(p, float(kind == "weight"))), name
        elif layer in zero:
            assert torch.equal(p, torch.zeros_like(p)), name
            checked.add(layer)
        elif layer == "map_label":
            assert scipy.stats.kstest(p.detach().flatten().numpy(), "norm").pvalue > 1e-3
            checked.add(layer)
        elif kind == "weight":
            assert is_uniform(p, 1 / math.sqrt(fans(p)[0])), name
            bias = dict(net.named_parameters())[name.replace("weight", "bias")]
            assert is_uniform(bias, 1 / math.sqrt(fans(p)[0])), name
            checked.add(layer)
    assert {*zero, "map_label", "conv0", "affine", "qkv", "map_layer0", "8x8_conv"} <= checked


@pytest.mark.parametrize("arch, eps", [("ddpmpp", 1e-6), ("ncsnpp", 1e-6), ("adm", 1e-5)])
def test_group_norms_have_the_published_groups_and_eps(arch, eps):
    # A group of spread sqrt(eps) comes out at sqrt(1/2) of unit spread.
    for name, module in network(arch, randomise=False).named_modules():
        if "norm" in name.split(".")[-1]:
            channels = len(module.weight)
            groups = min(32, channels // 4)
            x = randn(1, channels, 64, 64) * math.sqrt(eps)
            with torch.no_grad():
                y = module(x).reshape(groups, -1)
            torch.testing.assert_close(y.std(1), torch.full([groups], math.sqrt(0.5)), rtol=0.03,
                                       atol=0)
            assert y.mean(1).abs().max() < 1e-4


def test_an_untrained_adm_network_returns_c_skip_x():
    net, x = network("adm", randomise=False), randn(4, 3, 8, 8)
    sigma = torch.tensor([0.01, 0.5, 3.0, 80.0])
    expected = x * (0.25 / (0.25 + sigma.square())).reshape(4, 1, 1, 1)
    torch.testing.assert_close(net(x, sigma), expected, rtol=1e-6, atol=1e-9)


def test_an_untrained_song_network_returns_almost_c_skip_x():
    for arch in ("ddpmpp", "ncsnpp"):
        net, x = network(arch, randomise=False), randn(4, 3, 8, 8)
        difference = net(x, 0.5) - x / 2
        assert 0 < difference.abs().max() < 1e-3  # the output layer starts 1e-5 small


# ---- layers -------------------------------------------------------------------------------------

def group_norm(x, weight, bias, groups, eps):
    B, C, H, W = x.shape
    g = x.reshape(B, groups, -1)
    g = (g - g.mean(2, keepdims=True)) / np.sqrt(g.var(2, keepdims=True) + eps)
    return g.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


@pytest.mark.parametrize("heads, channels", [(1, 8), (2, 16), (4, 64)])
def test_attention_is_softmax_attention_with_interleaved_qkv(heads, channels):
    torch.manual_seed(0)
    # A fresh block's second convolution is zero, so what is left is x + attention(x).
    block = UNetBlock(channels, channels, 8, attention=True, num_heads=heads, eps=1e-5)
    with torch.no_grad():
        for p in (*block.norm2.parameters(), *block.qkv.parameters(), *block.proj.parameters()):
            p.copy_(torch.randn(p.shape) * 2 / math.sqrt(channels))
    x = randn(2, channels, 3, 5)
    with torch.no_grad():
        ours = block(x, randn(2, 8, seed=1)).double().numpy()

    def numpy(p):
        return p.detach().double().numpy()
    x = x.double().numpy()
    h = group_norm(x, numpy(block.norm2.weight), numpy(block.norm2.bias),
                   min(32, channels // 4), 1e-5).reshape(2, channels, 15)
    qkv = numpy(block.qkv.weight)[:, :, 0, 0] @ h + numpy(block.qkv.bias)[:, None]
    width = channels // heads
    mixed = np.zeros_like(h)
    for head in range(heads):
        q, k, v = (np.stack([qkv[:, (head * width + c) * 3 + j] for c in range(width)], 1)
                   for j in range(3))
        weights = scipy.special.softmax(
            np.einsum("bcq,bck->bqk", q, k) / math.sqrt(width), axis=2)
        mixed[:, head * width:(head + 1) * width] = np.einsum("bqk,bck->bcq", weights, v)
    expected = numpy(block.proj.weight)[:, :, 0, 0] @ mixed + numpy(block.proj.bias)[:, None]
    np.testing.assert_allclose(ours, x + expected.reshape(x.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adaptive, skip_scale", [(True, 1.0), (False, math.sqrt(0.5))])
def test_block_is_its_formula(adaptive, skip_scale):
    torch.manual_seed(0)
    block = UNetBlock(8, 16, 6, adaptive_scale=adaptive, skip_scale=skip_scale, eps=1e-6).eval()
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    x, emb = randn(2, 8, 5, 5), randn(2, 6, seed=1)
    with torch.no_grad():
        ours = block(x, emb).numpy()

    def conv(layer, x):
        w = layer.weight.detach().double().numpy()
        return np.array([[sum(scipy.signal.correlate(x[b, i], w[o, i], "same")
                              for i in range(w.shape[1])) + layer.bias[o].item()
                          for o in range(w.shape[0])] for b in range(len(x))])

    def norm(layer, x):
        return group_norm(x, layer.weight.detach().numpy(), layer.bias.detach().numpy(),
                          x.shape[1] // 4, 1e-6)

    def silu(x):
        return x * scipy.special.expit(x)
    x, emb = x.double().numpy(), emb.double().numpy()
    h = conv(block.conv0, silu(norm(block.norm0, x)))
    affine = (emb @ block.affine.weight.detach().numpy().T
              + block.affine.bias.detach().numpy())[:, :, None, None]
    if adaptive:
        scale, shift = affine[:, :16], affine[:, 16:]
        h = silu(norm(block.norm1, h) * (scale + 1) + shift)
    else:
        h = silu(norm(block.norm1, h + affine))
    expected = (conv(block.conv1, h) + conv(block.skip, x)) * skip_scale
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_box_filter_downsamples_by_averaging_and_upsamples_by_repetition():
    x = randn(2, 4, 6, 6)
    down = Conv2d(4, 4, 0, down=True, resample_filter=[1, 1])(x)
    torch.testing.assert_close(down, x.reshape(2, 4, 3, 2, 3, 2).mean([3, 5]))
    up = Conv2d(4, 4, 0, up=True, resample_filter=[1, 1])(x)
    torch.testing.assert_close(up, x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]])
def test_resampling_keeps_a_constant_image_inside_the_border(direction, taps):
    layer = Conv2d(2, 2, 0, resample_filter=taps, **{direction: True})
    y = layer(torch.full([1, 2, 8, 8], 0.7))
    assert y.shape[2:] == ((16, 16) if direction == "up" else (4, 4))
    torch.testing.assert_close(y[:, :, 1:-1, 1:-1], torch.full_like(y[:, :, 1:-1, 1:-1], 0.7))


def filter_down(x, taps, pad):
    kernel = np.outer(taps, taps) / sum(taps) ** 2
    x = np.pad(x.astype(np.float64), [(0, 0)] * (x.ndim - 2) + [(pad, pad)] * 2)
    full = scipy.signal.convolve(x, kernel.reshape((1,) * (x.ndim - 2) + kernel.shape), "valid")
    return full[..., ::2, ::2]


def test_four_tap_filter_is_a_convolution_on_the_zero_padded_image():
    x = randn(2, 4, 8, 8)
    taps = [1, 3, 3, 1]
    down = Conv2d(4, 4, 0, down=True, resample_filter=taps)(x)
    np.testing.assert_allclose(down, filter_down(x.numpy(), taps, 1), atol=1e-6)
    # Upsampling: zeros between the pixels, the filter times 4.
    up = Conv2d(4, 4, 0, up=True, resample_filter=taps)(x)
    stuffed = np.zeros([2, 4, 16, 16])
    stuffed[:, :, ::2, ::2] = x.numpy()
    kernel = np.outer(taps, taps).reshape(1, 1, 4, 4) / 16
    expected = scipy.signal.convolve(np.pad(stuffed, [(0, 0), (0, 0), (2, 1), (2, 1)]), kernel,
                                     "valid")
    np.testing.assert_allclose(up, expected, atol=1e-6)


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]])
def test_resampling_convolutions_filter_in_the_documented_order(taps):
    torch.manual_seed(0)
    x = randn(2, 3, 8, 8)
    pad = (len(taps) - 1) // 2
    functional = torch.nn.functional.conv2d
    down = Conv2d(3, 5, 3, down=True, resample_filter=taps)
    expected = functional(torch.tensor(filter_down(x.numpy(), taps, pad), dtype=torch.float32),
                          down.weight, down.bias, padding=1)
    torch.testing.assert_close(down(x), expected, rtol=1e-5, atol=1e-5)
    # Fused: the convolution first, with the filter's padding added, the bias last.
    fused = Conv2d(3, 5, 3, down=True, resample_filter=taps, fused_resample=True)
    with torch.no_grad():
        fused.bias.copy_(torch.randn(5))
    wide = functional(x, fused.weight.detach(), padding=1 + pad).numpy()
    expected = filter_down(wide, taps, 0) + fused.bias.detach().numpy()[:, None, None]
    np.testing.assert_allclose(fused(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    up = Conv2d(3, 5, 3, up=True, resample_filter=taps)
    wide = Conv2d(3, 3, 0, up=True, resample_filter=taps)(x)
    torch.testing.assert_close(up(x), functional(wide, up.weight, up.bias, padding=1),
                               rtol=1e-5, atol=1e-5)


# ---- embeddings ---------------------------------------------------------------------------------

def test_positional_frequencies_fall_from_1_to_a_ten_thousandth():
    t = torch.tensor([0.0, 0.7, 300.0])
    for endpoint, last in ((True, 7), (False, 8)):
        emb = PositionalEmbedding(16, endpoint=endpoint)(t).double().numpy()
        angles = t.double().numpy()[:, None] * 1e-4 ** (np.arange(8) / last)
        expected = np.concatenate([np.cos(angles), np.sin(angles)], 1)
        np.testing.assert_allclose(emb, expected, atol=5e-5)  # angles of 300 in float32


def inputs_of(net, modules, *args, **kwargs):
    """Returns what each of `modules` (names) is given in a forward pass."""
    seen = {}
    hooks = [net.get_submodule(name).register_forward_hook(
        lambda module, given, output, name=name: seen.update({name: (given, output)}))
        for name in modules]
    with torch.no_grad():
        net(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.long
@pytest.mark.parametrize("arch", NETWORKS)
def test_noise_label_and_augmentation_are_mapped_in_the_published_order(arch):
    net = network(arch)
    x, sigma = randn(3, 3, 8, 8), torch.tensor([0.1, 1.0, 9.0])
    labels, augment = randn(3, 4, seed=1), randn(3, 9, seed=2)
    model, silu = net.model, torch.nn.functional.silu
    seen = inputs_of(net, ["model.map_layer0", "model.enc.8x8_block0"], x, sigma, labels,
                     augment_labels=augment)
    c_noise = sigma.log() / 4
    if arch == "ncsnpp":
        angles = 2 * math.pi * c_noise[:, None] * model.map_noise.freqs
    else:
        count = NETWORKS[arch]["model_channels"] // 2
        angles = c_noise[:, None] * 1e-4 ** (
            torch.arange(count) / (count - (arch != "adm")))
    parts = [angles.cos(), angles.sin()]
    emb = torch.cat(parts if arch == "adm" else parts[::-1], 1)
    emb = emb + augment @ model.map_augment.weight.T
    if arch != "adm":
        emb = emb + 2 * labels @ model.map_label.weight.T + model.map_label.bias  # sqrt(4) = 2
    torch.testing.assert_close(seen["model.map_layer0"][0][0], emb, rtol=1e-4, atol=2e-4)

    emb = silu(emb @ model.map_layer0.weight.T + model.map_layer0.bias)
    emb = emb @ model.map_layer1.weight.T + model.map_layer1.bias
    if arch == "adm":
        emb = emb + labels @ model.map_label.weight.T
    torch.testing.assert_close(seen["model.enc.8x8_block0"][0][1], silu(emb), rtol=1e-4,
                               atol=2e-4)


def test_residual_encoder_adds_the_downsampled_input_over_root_two():
    net = network("ncsnpp")
    x = randn(2, 3, 8, 8)
    names = ["model.enc." + name for name in ("8x8_conv", "4x4_down", "4x4_aux_residual",
                                              "4x4_block0")]
    conv, down, aux, block = (inputs_of(net, names, x, 0.5)[name] for name in names)
    torch.testing.assert_close(aux[0][0], conv[0][0])  # aux starts as the network's input
    torch.testing.assert_close(block[0][0], (down[1] + aux[1]) / math.sqrt(2))


@pytest.mark.parametrize("arch", NETWORKS)
def test_decoder_blocks_see_the_encoders_outputs_last_first(arch):
    net = network(arch)
    encoder = [name for name in net.state_dict() if name.startswith("model.enc.")]
    encoder = [name for name in dict.fromkeys(".".join(name.split(".")[:3]) for name in encoder)
               if "aux" not in name]
    decoder = ["model.dec." + name for name in ("4x4_block0", "4x4_block1", "8x8_block0",
                                                "8x8_block1")]
    seen = inputs_of(net, [*encoder, *decoder], randn(2, 3, 8, 8), 0.5)
    assert len(encoder) == len(decoder)
    for i, (source, target) in enumerate(zip(encoder[::-1], decoder, strict=True)):
        skip = seen[source][1]
        if source.endswith("down") and arch in ("ncsnpp", "skip"):
            skip = seen[encoder[::-1][i - 1]][0][0]  # after the auxiliary input was added
        torch.testing.assert_close(seen[target][0][0][:, -skip.shape[1]:], skip)


# ---- the whole network --------------------------------------------------------------------------

@pytest.mark.parametrize("arch", NETWORKS)
def test_gradients_reach_every_parameter(arch):
    net = network(arch)
    net(randn(2, 3, 8, 8), torch.tensor([0.3, 2.0]), randn(2, 4, seed=1),
        augment_labels=randn(2, 9, seed=2)).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("arch", NETWORKS)
def test_gradients_lie_in_memory_as_their_parameters_do(arch):
    # Else DDP copies them into its buckets, and says so in three lines a rank.
    net = build_network({"class_name": "EDMPrecond", "img_resolution": 8, "img_channels": 3,
                         **NETWORKS[arch]})
    assert any(p.shape[2:] == (1, 1) for p in net.parameters())
    net(randn(2, 3, 8, 8), torch.tensor([0.3, 2.0]),
        augment_labels=randn(2, 9, seed=2)).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad.stride() == p.stride(), name


@pytest.mark.parametrize("arch", NETWORKS)
def test_an_image_does_not_see_the_others_of_its_batch(arch):
    net = network(arch)
    x, labels, sigma = randn(5, 3, 8, 8), torch.eye(5)[:, :4], torch.tensor([.1, .3, 1, 5, 20])
    augment = randn(5, 9, seed=1)
    with torch.no_grad():
        together = net(x, sigma, labels, augment_labels=augment)
        order = torch.tensor([3, 0, 4])
        some = net(x[order], sigma[order], labels[order], augment_labels=augment[order])
    # Another batch size may sum in another order.
    torch.testing.assert_close(some, together[order], rtol=1e-4, atol=1e-5)
    assert (together[1] - together[0]).abs().max() > 0.01


@pytest.mark.parametrize("arch", NETWORKS)
def test_label_dropout_forgets_labels_in_training_alone(arch):
    net = network(arch, label_dropout=1.0)
    x, labels = randn(2, 3, 8, 8), torch.eye(4)[:2]
    with torch.no_grad():
        told, bare = net(x, 1.0, labels), net(x, 1.0)
        assert (told - bare).abs().max() > 1e-2
        net.train()
        torch.testing.assert_close(net(x, 1.0, labels), bare)


def test_label_dropout_drops_each_image_at_its_rate():
    net = network(label_dropout=0.25)
    x, labels = randn(1, 3, 8, 8).expand(400, 3, 8, 8), torch.eye(4)[:1].expand(400, 4)
    torch.manual_seed(1)
    with torch.no_grad():
        told, bare = net(x[:1], 1.0, labels[:1]), net(x[:1], 1.0)
        net.train()
        mixed = net(x, 1.0, labels)
    dropped = (mixed - bare).abs().amax([1, 2, 3]) < (mixed - told).abs().amax([1, 2, 3])
    assert scipy.stats.binomtest(int(dropped.sum()), 400, 0.25).pvalue > 1e-3
    # Each image has its label or none at all, nothing between.
    nearest = torch.where(dropped.reshape(-1, 1, 1, 1), bare, told)
    torch.testing.assert_close(mixed, nearest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", NETWORKS)
def test_label_dropout_keeps_labels_as_they_are_or_makes_them_zero(arch):
    net = network(arch, label_dropout=0.5).train()
    labels = randn(64, 4, seed=1)  # vectors, not classes alone
    seen = inputs_of(net, ["model.map_label"], randn(64, 3, 8, 8), 1.0, labels)
    rows = seen["model.map_label"][0][0] / (1 if arch == "adm" else 2)  # times sqrt(4), Song's
    kept = (rows == labels).all(1)
    assert (kept | (rows == 0).all(1)).all() and 0 < kept.sum() < 64
    seen = inputs_of(net.eval(), ["model.map_label"], randn(64, 3, 8, 8), 1.0, labels)
    assert torch.equal(seen["model.map_label"][0][0] / (1 if arch == "adm" else 2), labels)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_label_dropout_draws_in_training_alone_and_only_where_it_is_on(rate):
    net, x, labels = network(label_dropout=rate), randn(2, 3, 8, 8), torch.eye(4)[:2]
    for training in (False, True):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        with torch.no_grad():
            net.train(training)(x, 1.0, labels)
        assert torch.equal(torch.get_rng_state(), before) is not (training and rate > 0)


@pytest.mark.parametrize("arch", NETWORKS)
def test_dropout_acts_in_training_alone(arch):
    net, x = network(arch, dropout=0.5), randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(net(x, 1.0), net(x, 1.0))
        net.train()
        assert (net(x, 1.0) - net(x, 1.0)).abs().max() > 1e-4


@pytest.mark.parametrize("cls", PRECONDS)
@pytest.mark.parametrize("arch", NETWORKS)
def test_a_network_is_rebuilt_from_its_config(cls, arch):
    options = {EDMPrecond: {"pfgmpp": True, "D": 3.5, "sigma_data": 0.7, "sigma_min": 0.01},
               VEPrecond: {"pfgmpp": True, "D": 2, "sigma_max": 50.0},
               VPPrecond: {"beta_d": 10.0, "M": 500}, iDDPMPrecond: {"M": 300}}[cls]
    net = network(arch, cls, **options)
    copy = build_network(json.loads(json.dumps(net.config))).eval()
    assert type(copy) is cls and copy.config == net.config
    assert (copy.D, copy.sigma_min, copy.sigma_max) == (net.D, net.sigma_min, net.sigma_max)
    copy.load_state_dict(net.state_dict(), strict=True)
    x, labels = randn(2, 3, 8, 8), torch.eye(4)[:2]
    with torch.no_grad():
        # Weights that lie otherwise in memory may be summed in another order.
        torch.testing.assert_close(copy(x, 1.3, labels), net(x, 1.3, labels), rtol=1e-4, atol=1e-5)


def test_default_models_are_the_references():
    small = {"model_channels": 64, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    for cls, model in [(VPPrecond, SongUNet), (VEPrecond, SongUNet),
                       (iDDPMPrecond, DhariwalUNet), (EDMPrecond, DhariwalUNet)]:
        assert type(cls(8, 3, **small).model) is model


@pytest.mark.parametrize("change", [
    {"class_name": "EDM"}, {"model_type": "UNet"}, {"channel_multiplier": [1, 2]},
    {"embedding_type": "sine"}, {"encoder_type": "residue"}, {"decoder_type": "residual"},
    {"img_resolution": 7}], ids=str)
def test_a_wrong_config_is_refused_in_one_line(change):
    config = network(randomise=False).config
    build_network(config)
    with pytest.raises(ValueError) as error:
        build_network({**config, **change})
    assert "\n" not in str(error.value) and str(error.value)


@pytest.mark.long
def test_every_preconditioner_builds_without_memory_for_its_weights():
    for name in ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"):
        with torch.device("meta"):
            net = build_network({"class_name": name, "img_resolution": 8, "img_channels": 3,
                                 "model_channels": 8, "channel_mult": [1], "num_blocks": 1})
        assert next(net.parameters()).is_meta
        assert net.sigma_min >= 0 and net.sigma_max > 80


@pytest.mark.parametrize("D", [0, -1, math.nan])
def test_a_network_refuses_an_impossible_D(D):
    with pytest.raises(ValueError, match="D="):
        EDMPrecond(8, 3, pfgmpp=True, D=D, model_channels=8, channel_mult=[1], num_blocks=1)
