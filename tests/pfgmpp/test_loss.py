"""The losses: laws of sigma, weights, minimiser, and draws that do not depend on the split."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
import torch

from pfgmpp.augment import AugmentPipe
from pfgmpp.kernel import PerturbationKernel
from pfgmpp.loss import LOSSES, EDMLoss, VELoss, VPLoss
from pfgmpp.networks import EDMPrecond, build_network
from training.config import TrainConfig
from training.objectives import build_loss

INF = math.inf
SHORT = (1, 2, 128, INF)
ALL_LOSSES = (EDMLoss, VELoss, VPLoss)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(batch, channels=3, side=4):
    return torch.rand(batch, channels, side, side, generator=seeded(99)) * 2 - 1


def loss_of(cls, D, **kwargs):
    return cls(pfgmpp=True, D=D, **kwargs)


class Net(torch.nn.Module):
    """A denoiser made of a function of (x, sigma); keeps what it was given."""

    def __init__(self, function):
        super().__init__()
        self.function, self.calls = function, []

    def forward(self, x, sigma, labels=None, force_fp32=False, augment_labels=None):
        self.calls.append((x, sigma, labels, augment_labels))
        return self.function(x, sigma)


def noise_of(draws):
    factor = draws.sigma.double().flatten() * draws.scale.double().flatten()
    return factor.reshape(-1, 1, 1, 1) * draws.z.double()


# ---- noise levels and weights -------------------------------------------------------------------

def vp_time_cdf(sigma):
    """t is uniform and sigma^2 + 1 = exp(9.95 t^2 + 0.1 t); solved for t."""
    log = np.log1p(np.float64(sigma) ** 2)
    t = (np.sqrt(0.1**2 + 2 * 19.9 * log) - 0.1) / 19.9
    return np.clip((t - 1e-5) / (1 - 1e-5), 0, 1)


@pytest.mark.parametrize("cls, law", [
    (EDMLoss, scipy.stats.lognorm(1.2, scale=math.exp(-1.2)).cdf),
    (VELoss, scipy.stats.loguniform(0.02, 100).cdf),
    (VPLoss, vp_time_cdf)])
def test_sigma_follows_the_published_law(cls, law):
    sigma = cls().sample_sigma(20_000, seeded(1))
    assert sigma.dtype == torch.float32 and sigma.shape == (20_000,)
    assert scipy.stats.kstest(sigma.double().numpy(), law).pvalue > 1e-3


def test_sigma_laws_follow_their_options():
    sigma = EDMLoss(P_mean=0.5, P_std=0.3).sample_sigma(20_000, seeded(2)).double().log().numpy()
    assert scipy.stats.kstest(sigma, scipy.stats.norm(0.5, 0.3).cdf).pvalue > 1e-3
    sigma = VELoss(sigma_min=0.1, sigma_max=10).sample_sigma(20_000, seeded(2)).double().numpy()
    assert scipy.stats.kstest(sigma, scipy.stats.loguniform(0.1, 10).cdf).pvalue > 1e-3
    sigma = VPLoss(beta_d=0, beta_min=2, epsilon_t=0.5).sample_sigma(20_000, seeded(2)).double()
    t = torch.log1p(sigma.square()) / 2  # sigma^2 + 1 = exp(beta_min t)
    assert scipy.stats.kstest(t.numpy(), scipy.stats.uniform(0.5, 0.5).cdf).pvalue > 1e-3


@pytest.mark.parametrize("cls, weight", [
    (EDMLoss, lambda s: (s**2 + 0.25) / (s * 0.5) ** 2),
    (VELoss, lambda s: 1 / s**2),
    (VPLoss, lambda s: 1 / s**2)])
def test_weights_are_the_published_ones(cls, weight):
    sigma = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0])
    np.testing.assert_allclose(cls().weight(sigma), weight(sigma.double().numpy()), rtol=1e-6)


def test_edm_weight_follows_sigma_data():
    assert EDMLoss(sigma_data=2.0).weight(torch.tensor(2.0)).item() == pytest.approx(0.5)


@pytest.mark.parametrize("D", SHORT)
@pytest.mark.parametrize("sigma_data", [0.1, 0.5, 3.0])
def test_sigma_data_of_the_network_makes_the_loss_that_of_F_at_every_sigma(sigma_data, D):
    # D_theta - y = c_out (F - target), so with the same sigma_data on both sides the loss of a
    # network is |F - target|^2: for F = 0, and data of that deviation, of mean 1 at every sigma.
    config = TrainConfig(data="none", pfgmpp=not math.isinf(D), aug_dim=D)
    net = EDMPrecond(2, 1, sigma_data=sigma_data, model_type="SongUNet", model_channels=4,
                     channel_mult=[1], num_blocks=1, pfgmpp=not math.isinf(D), D=D)
    net = build_network(net.config)  # as a checkpoint gives it back
    net.model = Net(lambda x, sigma: torch.zeros_like(x))
    loss_fn = build_loss(config, net)
    assert loss_fn.sigma_data == net.sigma_data == sigma_data and loss_fn.kernel.D == net.D == D
    y = sigma_data * torch.randn(4000, 1, 2, 2, generator=seeded(1))
    draws = loss_fn.draw(y.shape, seeded(2))
    draws = dataclasses.replace(draws, scale=torch.ones_like(draws.scale))  # variance 1
    loss = loss_fn(net, y, draws=draws).double()
    (x, *_), = net.model.calls
    # 16,000 squares of unit normal numbers: their mean has a deviation of 0.011.
    assert loss.mean().item() == pytest.approx(1, abs=0.05)
    low, high = (loss[part].mean().item() for part in (draws.sigma < 0.3, draws.sigma >= 0.3))
    assert low == pytest.approx(1, abs=0.07) and high == pytest.approx(1, abs=0.07)
    assert x.double().square().mean().item() == pytest.approx(1, abs=0.05)  # what F sees


@pytest.mark.parametrize("lsun", [False, True])
def test_noise_levels_of_a_run_have_the_law_that_its_options_say(lsun):
    config = TrainConfig(data="none", P_mean=0.7, P_std=0.3, lsun=lsun)
    net = EDMPrecond(2, 1, model_type="SongUNet", model_channels=4, channel_mult=[1], num_blocks=1)
    log_sigma = build_loss(config, net).sample_sigma(20_000, seeded(4)).double().log().numpy()
    law = scipy.stats.norm(0.7 + (math.log(380 / 80) if lsun else 0), 0.3)
    assert scipy.stats.kstest(log_sigma, law.cdf).pvalue > 1e-3


def test_losses_are_listed_by_their_preconditioner():
    assert {"edm": EDMLoss, "ve": VELoss, "vp": VPLoss} == LOSSES


# ---- values of the loss -------------------------------------------------------------------------

@pytest.mark.parametrize("D", SHORT)
@pytest.mark.parametrize("cls", ALL_LOSSES)
def test_loss_is_weight_times_squared_error_per_pixel(cls, D):
    loss_fn, y = loss_of(cls, D), images(6)
    draws = loss_fn.draw(y.shape, seeded(3))
    net = Net(lambda x, sigma: torch.zeros_like(x))
    loss = loss_fn(net, y, draws=draws)
    (x, sigma, _, _), = net.calls
    weight = loss_fn.weight(sigma.double()).reshape(-1, 1, 1, 1)
    assert loss.shape == y.shape
    # D_theta = 0 leaves weight * y^2; D_theta = x leaves weight * n^2.
    torch.testing.assert_close(loss.double(), weight * y.double().square(), rtol=1e-5, atol=0)
    loss = loss_fn(Net(lambda x, sigma: x), y, draws=draws)
    torch.testing.assert_close(loss.double(), weight * (x.double() - y).square(), rtol=1e-4,
                               atol=0)
    # x = y + n is rounded to float32.
    torch.testing.assert_close(x.double(), y + noise_of(draws), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sigma.flatten(), draws.sigma.flatten())


@pytest.mark.parametrize("D", SHORT)
@pytest.mark.parametrize("cls", ALL_LOSSES)
@pytest.mark.parametrize("augment", [False, True])
def test_loss_of_a_perfect_denoiser_is_zero(cls, D, augment):
    # With augmentation too: the target is the augmented image.
    loss_fn, y = loss_of(cls, D), images(6, side=8)
    pipe = AugmentPipe.standard(1.0) if augment else None
    draws = loss_fn.draw(y.shape, seeded(4), pipe)
    net = Net(lambda x, sigma: (x.double() - noise_of(draws)).float())
    loss = loss_fn(net, y, None, pipe, draws=draws)
    (x, sigma, _, _), = net.calls
    # x holds y + n to 6e-8 of its size, and the error counts by the weight.
    rounding = loss_fn.weight(sigma.reshape(-1, 1, 1, 1)) * (2e-7 * (x.abs() + 1)).square()
    assert (loss <= rounding).all()
    if augment:
        worse = loss_fn(Net(lambda x, sigma: y), y, None, pipe, draws=draws)
        assert (worse.mean([1, 2, 3]) > loss.mean([1, 2, 3])).all()


@pytest.mark.parametrize("D", SHORT)
def test_the_network_sees_noise_of_the_kernels_law(D):
    loss_fn, y = loss_of(EDMLoss, D), images(8000, 3, 2)
    net = Net(lambda x, sigma: x)
    loss_fn(net, y, draws=loss_fn.draw(y.shape, seeded(5)))
    (x, sigma, _, _), = net.calls
    unit = (x.double() - y) / sigma.double().reshape(-1, 1, 1, 1)
    squared = unit.square().sum([1, 2, 3]).numpy()
    law = (scipy.stats.chi2(12) if math.isinf(D)
           else scipy.stats.betaprime(6, D / 2, scale=D))
    assert scipy.stats.kstest(squared, law.cdf).pvalue > 1e-3


def test_noise_is_gaussian_unless_pfgmpp():
    y = images(4)
    plain = EDMLoss(pfgmpp=False, D=1).draw(y.shape, seeded(6))
    assert torch.equal(plain.scale, torch.ones_like(plain.scale))
    assert torch.equal(EDMLoss().draw(y.shape, seeded(6)).scale, plain.scale)


def test_labels_and_augment_labels_reach_the_network():
    y, labels = images(6, side=8), torch.eye(6)
    loss_fn, pipe = EDMLoss(), AugmentPipe.standard(1.0)
    draws = loss_fn.draw(y.shape, seeded(7), pipe)
    net = Net(lambda x, sigma: x)
    loss_fn(net, y, labels, pipe, draws=draws)
    loss_fn(net, y, labels, None, draws=loss_fn.draw(y.shape, seeded(7)))
    (_, _, seen, augment), (_, _, _, none) = net.calls
    assert torch.equal(seen, labels)
    torch.testing.assert_close(augment, draws.augment.labels())
    assert augment.shape == (6, 9) and augment.abs().sum() > 0
    assert none is None or none.abs().sum() == 0


# ---- draws --------------------------------------------------------------------------------------

@pytest.mark.parametrize("D", SHORT)
@pytest.mark.parametrize("cls", ALL_LOSSES)
@pytest.mark.parametrize("augment", [False, True])
def test_the_loss_of_a_slice_is_the_slice_of_the_loss(cls, D, augment):
    loss_fn, y = loss_of(cls, D), images(8)
    pipe = AugmentPipe.standard(0.5) if augment else None
    draws = loss_fn.draw(y.shape, seeded(8), pipe)

    def loss(part):
        net = Net(lambda x, sigma: 0.5 * x)
        return loss_fn(net, y[part], None, pipe, draws=draws[part])
    whole = loss(slice(0, 8))
    for part in (slice(0, 4), slice(4, 8), slice(2, 3), slice(5, 8)):
        if augment:  # the warp is a matrix product, whose rounding depends on the batch
            torch.testing.assert_close(loss(part), whole[part], rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(loss(part), whole[part])


@pytest.mark.parametrize("cls", ALL_LOSSES)
@pytest.mark.parametrize("augment", [False, True])
def test_one_seed_gives_one_augmentation_level_and_direction_at_every_D(cls, augment):
    pipe = AugmentPipe.standard(0.7) if augment else None
    reference = loss_of(cls, INF).draw((5, 3, 4, 4), seeded(9), pipe)
    other = loss_of(cls, INF).draw((5, 3, 4, 4), seeded(10), pipe)
    assert not torch.equal(reference.z, other.z)
    for D in (0.5, 1, 2, 128, 1e6):
        draws = loss_of(cls, D).draw((5, 3, 4, 4), seeded(9), pipe)
        assert torch.equal(draws.sigma, reference.sigma)
        assert torch.equal(draws.z, reference.z)
        assert (draws.scale != 1).all()
        if augment:
            assert torch.equal(draws.augment.labels(), reference.augment.labels())


def fields_of(draws):
    return [draws.sigma, draws.z, draws.scale,
            *(getattr(draws.augment, field.name) for field in dataclasses.fields(draws.augment))]


@pytest.mark.parametrize("D", SHORT)
@pytest.mark.parametrize("size", [3, 8, 16, 25])
def test_draws_of_a_range_do_not_depend_on_how_a_batch_is_cut(D, size):
    loss, pipe, blocks = loss_of(EDMLoss, D), AugmentPipe(p=0.5, xflip=1, scale=1, aniso=1), []

    def block_rng(block):
        blocks.append(block)
        return seeded(1000 + block)

    def draw(first, last):
        return loss.draw_range(first, last, (3, 4, 4), block_rng, pipe)
    whole = draw(0, 50)
    parts = [draw(first, min(first + size, 50)) for first in range(0, 50, size)]
    for field, *pieces in zip(fields_of(whole), *map(fields_of, parts), strict=True):
        assert len(field) == 50 and torch.equal(field, torch.cat(pieces))
    for first in range(0, 50, 16):  # each block is that of its own generator
        block = loss.draw((16, 3, 4, 4), seeded(1000 + first // 16), pipe)
        for field, expected in zip(fields_of(whole), fields_of(block), strict=True):
            assert torch.equal(field[first:first + 16], expected[:50 - first])
    del blocks[:]
    draw(16, 48)
    assert blocks == [1, 2], "no other is drawn"


def test_without_draws_the_loss_draws_from_the_default_generator():
    loss_fn, y = loss_of(EDMLoss, 2), images(4)
    net = Net(lambda x, sigma: 0.5 * x)
    torch.manual_seed(11)
    implicit = loss_fn(net, y)
    assert torch.equal(implicit, loss_fn(net, y, draws=loss_fn.draw(y.shape, seeded(11))))
    assert not torch.equal(implicit, loss_fn(net, y))


# ---- the minimiser ------------------------------------------------------------------------------

DIRECTIONS = (
    lambda x: torch.ones_like(x), torch.tanh, lambda x: torch.tanh(x) ** 2, lambda x: torch.cos(x),
    lambda x: 1 / (1 + x.square().sum([1, 2, 3], keepdim=True)).expand_as(x))


def slopes_at(denoiser_D, noise_D):
    """Standard scores of the expected loss's slopes at a denoiser, in several directions.

    The loss is quadratic in the denoiser, so (L(f + g) - L(f - g))/4 is half its slope along g.
    """
    sigma, batch = 0.7, 100_000
    data = torch.tensor([[0.9, 0.2], [-0.5, -0.8]]).reshape(2, 1, 1, 2)
    y = data[torch.randint(2, [batch], generator=seeded(12))]
    loss_fn = loss_of(EDMLoss, noise_D, P_mean=math.log(sigma), P_std=0)
    draws = loss_fn.draw(y.shape, seeded(13))
    kernel, scores = PerturbationKernel(denoiser_D), []
    for g in DIRECTIONS:
        up, down = (loss_fn(Net(lambda x, s, g=g, sign=sign: kernel.posterior_mean(x, s, data)
                                + sign * g(x)), y, draws=draws) for sign in (1, -1))
        slope = (up - down).double().sum([1, 2, 3]) / 4
        scores.append((slope.mean() / slope.std() * math.sqrt(batch)).item())
    return np.array(scores)


@pytest.mark.parametrize("D", SHORT)
def test_the_ideal_denoiser_minimises_the_expected_loss(D):
    # At the minimum every slope is zero: standard scores within 4 for five directions.
    assert np.abs(slopes_at(D, D)).max() < 4
    # The same test tells the denoiser of another D apart.
    assert np.abs(slopes_at(INF if D < 100 else 2, D)).max() > 6


@pytest.mark.parametrize("loss_fn", [EDMLoss(), VELoss(), VPLoss()])
def test_the_network_sees_sigma_shaped_to_broadcast_over_the_images(loss_fn):
    """As in the published losses, so that any denoiser written for them works."""
    def net(x, sigma, labels=None, augment_labels=None):
        assert sigma.shape == (4, 1, 1, 1)
        return x / (1 + sigma**2)
    assert loss_fn(net, torch.randn(4, 3, 8, 8), None, None).shape == (4, 3, 8, 8)


def test_any_function_can_augment():
    def pipe(images):
        return -images, torch.full([len(images), 9], 2.0)

    def net(x, sigma, labels=None, augment_labels=None):
        assert (augment_labels == 2).all()
        return -ones
    ones = torch.ones(4, 3, 8, 8)
    assert (EDMLoss()(net, ones, None, pipe) == 0).all()


@pytest.mark.parametrize("D", SHORT)
def test_lsun_raises_the_noise_levels_of_a_seed_by_380_over_80(D):
    plain, lsun = (loss_of(EDMLoss, D, lsun=on).draw((50, 3, 4, 4), seeded()) for on in (0, 1))
    torch.testing.assert_close(lsun.sigma, plain.sigma * 4.75)
    assert torch.equal(lsun.z, plain.z) and torch.equal(lsun.scale, plain.scale)


@pytest.mark.parametrize("D", SHORT)
@pytest.mark.parametrize("cls", ALL_LOSSES)
def test_the_loss_of_the_ideal_denoiser_is_zero_for_stable_targets(cls, D):
    # The target is the mean of the reference images given the noisy image, not the clean one.
    loss_fn, reference = loss_of(cls, D), images(40)
    net = Net(lambda x, sigma: PerturbationKernel(D).posterior_mean(x, sigma, reference))
    draws = loss_fn.draw(reference.shape, seeded())
    assert loss_fn(net, reference, draws=draws, reference=reference).abs().max() == 0
    assert loss_fn(net, reference, draws=draws).max() > 1e-4


def in_classes(num, classes):
    return torch.eye(classes)[torch.arange(num) % classes]


@pytest.mark.parametrize("D", SHORT)
def test_stable_targets_are_means_over_the_own_class(D):
    # A network that says 0 shows them, but for their sign: weight * target^2.
    loss_fn, reference, labels = loss_of(EDMLoss, D), images(40), in_classes(40, 3)
    draws = loss_fn.draw(reference.shape, seeded())
    net = Net(lambda x, sigma: torch.zeros_like(x))
    loss = loss_fn(net, reference, labels, draws=draws, reference=reference,
                   reference_labels=labels)
    (x, sigma, _, _), = net.calls
    classes = labels.argmax(dim=1)
    for i in range(40):
        own = reference[classes == classes[i]].double().flatten(1)
        squared = (x[i].double().flatten() - own).square().sum(dim=1) / draws.sigma[i].double()**2
        power = -squared / 2 if math.isinf(D) else -(48 + D) / 2 * (1 + squared / D).log()
        mean = (power.softmax(dim=0)[:, None] * own).sum(dim=0).reshape(3, 4, 4)
        expected = loss_fn.weight(sigma[i].double()) * mean.square()
        torch.testing.assert_close(loss[i].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("D", SHORT)
def test_stable_targets_have_a_network_listen_to_its_labels(D):
    # Two classes of one image each, at noise that hides which: the label alone tells.
    y = torch.tensor([-0.5, 0.5]).repeat(200).reshape(400, 1, 1, 1).expand(-1, 1, 2, 2)
    labels = in_classes(400, 2)
    loss_fn = loss_of(EDMLoss, D, P_mean=math.log(80), P_std=0)
    draws = loss_fn.draw(y.shape, seeded(3))

    def loss(denoiser):
        return loss_fn(Net(denoiser), y, labels, draws=draws, reference=y,
                       reference_labels=labels).mean().item()
    ideal = loss(lambda x, sigma: y)
    deaf = loss(lambda x, sigma: PerturbationKernel(D).posterior_mean(x, sigma, y))
    assert ideal < 1e-9 and deaf > 0.5


def test_stable_targets_of_what_a_mean_does_not_know_are_refused():
    loss_fn, y, net = EDMLoss(), images(4, side=8), Net(lambda x, sigma: x)
    with pytest.raises(ValueError, match="stable targets with augmentation"):
        loss_fn(net, y, None, AugmentPipe.standard(0.1), reference=y)
    with pytest.raises(ValueError, match="labels of 2 dimensions and reference_labels of 0"):
        loss_fn(net, y, in_classes(4, 2), reference=y)
    with pytest.raises(ValueError, match="labels of 0 dimensions and reference_labels of 2"):
        loss_fn(net, y, reference=y, reference_labels=in_classes(4, 2))
    assert not net.calls


@pytest.mark.parametrize("cls", ALL_LOSSES)
def test_the_noise_levels_of_a_seed_do_not_depend_on_the_size_of_images(cls):
    loss_fn = loss_of(cls, 128)
    small, large = (loss_fn.draw((5, 3, side, side), seeded(4)) for side in (2, 8))
    assert torch.equal(small.sigma, large.sigma)
