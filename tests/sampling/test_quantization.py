import copy

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


# ----------------------------------------------------------------------------- stochastic rounding


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def places(weight, bits):
    """Returns step, zero point and, in steps from level 0, where the weights lie."""
    top = 2**bits - 1
    step = (weight.max() - weight.min()) / top
    zero = (-weight.min() / step).clamp(0, top).trunc()
    return step, zero, weight / step + zero


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_weight_goes_to_one_of_the_two_levels_beside_it(bits):
    weight = torch.randn([300], generator=rng(bits), dtype=torch.float64)
    step, zero, place = places(weight, bits)
    below = place.clamp(0).floor()
    seen = torch.stack([quantised(weight, bits, rng(seed)) for seed in range(60)]) / step + zero
    level = seen.round()
    torch.testing.assert_close(seen, level, rtol=0, atol=1e-9)
    assert ((level == below) | (level == below + 1)).all()
    assert level.min() >= 0 and level.max() <= 2**bits - 1
    inside = (place - below > 0.2) & (place - below < 0.8)  # 60 draws of one kind: 2e-6 at most
    assert (level[:, inside].amin(0) == below[inside]).all()
    assert (level[:, inside].amax(0) == below[inside] + 1).all()


def test_the_mean_over_seeds_is_the_weight_and_the_variance_that_of_two_levels():
    weight, bits, draws = torch.randn([400], generator=rng(1), dtype=torch.float64), 3, 4000
    step, _, place = places(weight, bits)
    share = place.clamp(0) - place.clamp(0).floor()
    rounded = torch.stack([quantised(weight, bits, rng(seed)) for seed in range(draws)])
    error = (rounded.mean(0) - weight) / step
    std_error = (share * (1 - share) / draws).sqrt()
    inside = place >= 0  # below, truncating the zero point has cut off
    assert 0 < (~inside).sum() < 40
    assert (error.abs() <= 4.5 * std_error + 1e-9)[inside].all()  # of 400 normals: p < 0.003
    assert ((error[inside] / std_error[inside].clamp(1e-9)).square().mean() - 1).abs() < 0.35
    torch.testing.assert_close(error[~inside], -place[~inside], rtol=0, atol=1e-9)
    variance = (rounded / step).var(0)
    assert ((variance - share * (1 - share)).abs() < 5 * 0.5 / draws**0.5).all()


def test_what_is_on_a_level_stays_there_under_every_draw():
    levels = torch.arange(-8, 8).float() * 0.25
    for seed in range(20):
        assert torch.equal(quantised(levels, 4, rng(seed)), levels)
    # A sum with u close to 1 would round up in float32, above all far from level 0.
    weight = torch.zeros([400_000])
    weight[:2] = torch.tensor([-1.0, 1e-3])
    for seed in range(4):
        rounded = quantised(weight, 16, rng(seed))
        assert not rounded[2:].any()


def test_a_seed_gives_the_same_weights_and_another_seed_others():
    net, rounded = network(), {}
    for name, seed in (("first", 5), ("same", 5), ("other", 6)):
        rounded[name] = copy.deepcopy(net)
        torch.manual_seed(len(rounded))  # which no rounding looks at
        quantise_(rounded[name], 3, seed)
    for (name, weight), first, same, other in zip(
            net.named_parameters(), *(other.parameters() for other in rounded.values()),
            strict=True):
        assert torch.equal(first, same)
        if is_quantised(name):
            assert torch.equal(first, other) == (weight.min() == weight.max())
        else:
            assert torch.equal(first, weight) and torch.equal(other, weight)


def test_the_draws_follow_the_order_of_the_parameters():
    net = network()
    before = {name: tensor.clone() for name, tensor in net.named_parameters()}
    quantise_(net, 4, 7)
    one_after_another = rng(7)
    for name, tensor in net.named_parameters():
        if is_quantised(name):
            w = before[name]
            step = (w.max() - w.min()) / 15
            if step > 0:
                place = ((-w.min() / step).trunc() + w / step).clamp(0, 15)
                up = torch.rand(w.shape, generator=one_after_another) < place - place.floor()
                w = step * (place.floor() + up - (-w.min() / step).trunc())
            torch.testing.assert_close(tensor, w, msg=name)


def test_32_bits_need_no_draw():
    net = network()
    rounded = copy.deepcopy(net)
    quantise_(rounded, 32, 1)
    assert all(map(torch.equal, rounded.parameters(), net.parameters()))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_the_generator_would_take_for_others_are_refused(seed):
    with pytest.raises(ValueError, match=f"rounding_seed={seed}: must be from 0 to 4294967295"):
        quantise_(network(), 4, seed)
