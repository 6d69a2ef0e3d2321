import numpy as np
import pytest
import torch

from pfgmpp.networks import EDMPrecond
from sampling.quantization import is_quantised, quantise_, quantised


def by_hand(weight, bits):
    """The published recipe in NumPy, one tensor at a time."""
    w = weight.numpy().astype(np.float64)
    scale = (w.max() - w.min()) / (2**bits - 1)
    zero = int(np.clip(-w.min() / scale, 0, 2**bits - 1))
    return scale * (np.round(np.clip(zero + w / scale, 0, 2**bits - 1)) - zero)


@pytest.mark.parametrize("bits", range(2, 12))
def test_weights_move_by_at_most_half_a_step_inside_and_a_step_at_the_low_end(bits):
    weight = torch.randn([64, 32], generator=torch.Generator().manual_seed(bits))
    rounded = quantised(weight, bits)
    step = (weight.max() - weight.min()) / (2**bits - 1)
    error = (rounded - weight).abs()
    slack = 1 + 1e-4  # float32
    assert error.max() < step * slack
    inside = weight > weight.min() + step
    assert error[inside].max() <= step / 2 * slack
    assert len(rounded.unique()) <= 2**bits
    assert 0 in quantised(torch.cat([weight, torch.zeros(1, 32)]), bits)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_rounding_is_the_published_recipe(bits):
    weight = torch.randn([500], generator=torch.Generator().manual_seed(bits))
    step = (weight.max() - weight.min()) / (2**bits - 1)
    off = np.abs(quantised(weight, bits).numpy() - by_hand(weight, bits)) / step.item()
    # In float32 a value halfway between two levels may go to either.
    assert (off < 1e-3).mean() > 0.99 and off.max() < 1.001


def test_a_tensor_that_is_on_the_levels_stays():
    weight = torch.arange(-8, 8).float() * 0.25
    assert torch.equal(quantised(weight, 4), weight)
    assert torch.equal(quantised(torch.full([5], 0.3), 4), torch.full([5], 0.3))


def network(resolution=32):
    return EDMPrecond(resolution, 3, model_type="SongUNet", model_channels=8, num_blocks=1,
                      channel_mult=[1, 2], attn_resolutions=[16], encoder_type="residual")


@pytest.mark.parametrize("resolution", [32, 64])
def test_the_spared_layers_keep_every_bit(resolution):
    net = network(resolution)
    before = {name: tensor.clone() for name, tensor in net.named_parameters()}
    quantise_(net, 3)
    changed = {name for name, tensor in net.named_parameters()
               if not torch.equal(tensor, before[name])}
    assert changed
    for name in changed:
        assert name.endswith("weight")
        assert not any(part in name for part in ("norm", "affine", "map_", "32x32"))
    assert {name for name in before if is_quantised(name)} == changed
    assert any("64x64" in name for name in changed) == (resolution == 64)


def test_32_bits_are_the_identity_and_none_is_refused():
    net = network()
    before = {name: tensor.clone() for name, tensor in net.named_parameters()}
    quantise_(net, 32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.named_parameters())
    with pytest.raises(ValueError, match="bits=0: must be 1 or more"):
        quantise_(net, 0)


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(6))
def test_the_zero_point_is_cut_off_and_levels_are_rounded(seed, bits):
    # In float64, where no two levels are taken for one another by rounding.
    w = torch.from_numpy(np.random.default_rng(seed).normal(0.3 * seed, 1, 500))
    np.testing.assert_allclose(quantised(w, bits), by_hand(w, bits), rtol=1e-9, atol=1e-12)
