"""Consistency losses against the exact consistency function, closed forms, and their papers."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from ideal_flow import IdealFlow, noise_on_a_line

from pfgmpp.consistency import (
    ConsistencyDistillationLoss,
    ConsistencyTuningLoss,
    distance,
)
from pfgmpp.loss import LossDraws
from pfgmpp.networks import EDMPrecond, build_network
from pfgmpp.solvers import heun_step

INF = math.inf
DIMS = (2, 128, INF)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def kernel_options(D):
    return {"pfgmpp": not math.isinf(D), **({} if math.isinf(D) else {"D": D})}


def wide(draws, sigma=None):
    """The same draws in float64, perhaps at other levels."""
    sigma = draws.sigma if sigma is None else sigma
    return LossDraws(sigma.double(), draws.z.double(), draws.scale)


# ---- consistency distillation -------------------------------------------------------------------

def edm_grid(num, low, high=80.0):
    return torch.linspace(high ** (1 / 7), low ** (1 / 7), num, dtype=torch.float64) ** 7


def cd_error(D, num, f=None, target=None, metric="l2"):
    """The loss of each image of 256 on a grid of `num` levels, with f* where nothing is given."""
    points = 0.5 * torch.randn(6, 1, 2, 2, generator=seeded(1), dtype=torch.float64)
    flow = IdealFlow(D, points, end=0.2)
    # The grid as float32 has it, for the last of its levels is where f* ends.
    levels = edm_grid(num, flow.end).float()
    flow.end = levels[-1].item()
    f, target = getattr(flow, f or "solve"), getattr(flow, target or f or "solve")
    loss = ConsistencyDistillationLoss(flow.denoise, levels, target, metric, **kernel_options(D))
    y = points[torch.arange(256) % 6]
    return loss(f, y, draws=wide(loss.draw(y.shape, seeded(2))))


@pytest.mark.parametrize("D", DIMS)
def test_cd_at_the_exact_function_is_the_error_of_a_heun_step(D):
    errors = [cd_error(D, num).sqrt().mean().item() for num in (12, 24, 48)]
    # A step's error is of third order in its length.
    slope = -np.polyfit(np.log([11, 23, 47]), np.log(errors), 1)[0]
    assert 2.4 < slope < 4, errors
    assert errors[-1] < 1e-3
    # The denoiser is no consistency function: a step changes it by much more than Heun's error.
    for f, target in (("denoise", "denoise"), ("denoise", "solve"), ("solve", "denoise")):
        assert cd_error(D, 48, f, target).sqrt().mean() > 20 * errors[-1]


@pytest.mark.parametrize("D", DIMS)
def test_cds_default_distance_is_pseudo_huber_with_the_published_constant(D):
    squared = cd_error(D, 12, "denoise")
    c = 0.00054 * math.sqrt(4)
    torch.testing.assert_close(cd_error(D, 12, "denoise", metric="huber"),
                               (squared + c**2).sqrt() - c)


@pytest.mark.parametrize("D", DIMS)
def test_cd_holds_its_function_where_the_levels_end(D):
    flow = IdealFlow(D, LINE, end=0.2)
    levels = edm_grid(24, flow.end).float()
    flow.end = levels[-1].item()
    loss = ConsistencyDistillationLoss(flow.denoise, levels, metric="l2", **kernel_options(D))
    y = LINE[torch.arange(300) % 3]

    def error(shift, level):
        draws = wide(loss.draw(y.shape, seeded(3)), torch.full([300], level))
        return loss(lambda x, s, labels: flow.solve(x, s) + shift, y, draws=draws).mean().item()

    above, last = levels[4].double().item(), levels[-2].double().item()
    # f* and f* + 0.5 are both the same along a path; only f* is the identity at its end.
    assert error(0.5, above) == pytest.approx(error(0.0, above)) and error(0.0, above) < 1e-4
    assert error(0.0, last) < 1e-4 and error(0.5, last) == pytest.approx(0.25, abs=0.01)


def test_heuns_step_by_hand():
    # T(x) = x/4: slopes 3x/(4 sigma). From 2 to 1 at x = 8: 3, guess 5, 3.75, so 8 - 3.375.
    x, high, low = (torch.tensor([[v]]).double() for v in (8.0, 2.0, 1.0))
    assert heun_step(lambda x, sigma: x / 4, x, high, low).item() == 4.625


def test_cd_by_hand_with_scale_labels_and_condition():
    seen = []

    def named(name, gain):
        def net(x, sigma, labels, condition):
            seen.append((name, sigma.flatten().tolist(), labels, condition))
            return gain * x
        return net

    teacher, target, net = named("teacher", 0.25), named("target", 3.0), named("net", 2.0)
    loss = ConsistencyDistillationLoss(teacher, torch.tensor([4.0, 2.0, 1.0]), target, "l2")
    draws = LossDraws(torch.tensor([2.0, 4.0]).double(), torch.tensor([[1.0], [-1.0]]).double(),
                      torch.tensor([1.5, 0.5]).double())
    y, labels, condition = torch.tensor([[5.0], [6.0]]).double(), torch.eye(2), torch.ones(2, 1)
    found = loss(net, y, labels, draws=draws, condition=condition)
    # x = 5 + 2*1.5 = 8 becomes 4.625; x = 6 - 4*0.5 = 4 becomes 4 - 2(0.75 + 2.5*0.75/2)/2.
    x, below = [8.0, 4.0], [4.625, 4 - (0.75 + 2.5 * 0.375)]
    # Of the first one the lower level is the last, at which the target is the state itself.
    assert found.tolist() == [(2 * a - gain * b) ** 2
                              for a, gain, b in zip(x, (1, 3), below, strict=True)]
    assert [(name, levels) for name, levels, *_ in seen] == [
        ("teacher", [2, 4]), ("teacher", [1, 2]), ("target", [1, 2]), ("net", [2, 4])]
    assert all(given[2] is labels and given[3] is condition for given in seen)


def test_cd_takes_the_network_itself_where_there_is_no_target():
    loss = ConsistencyDistillationLoss(lambda x, sigma, labels: 0 * x, torch.tensor([4.0, 2, 1]),
                                       metric="l2")
    y, called = torch.zeros(3, 1), []
    draws = LossDraws(torch.tensor([4.0, 4, 2]), torch.ones(3, 1), torch.ones(3).double())

    def net(x, sigma, labels):
        called.append("net")
        return x / sigma

    def frozen(x, sigma, labels):
        called.append("frozen")
        return x / sigma

    # T = 0: states grow as sigma, so that x/sigma is a consistency function, but for Heun's error.
    loss(net, y, draws=draws)
    assert called == ["net", "net"]
    found = loss(net, y, draws=draws, frozen=frozen)
    assert called[2:] == ["frozen", "net"]
    torch.testing.assert_close(found, torch.zeros(3))  # whose slope is the same everywhere: none


@pytest.mark.parametrize("D", DIMS)
def test_cds_levels_are_all_but_the_lowest_equally_often(D):
    levels = edm_grid(10, 0.002).float()
    loss = ConsistencyDistillationLoss(None, levels, **kernel_options(D))
    draws = loss.draw((20_000, 1), seeded(3))
    counts = [(draws.sigma == level).sum().item() for level in levels]
    assert counts[-1] == 0 and scipy.stats.chisquare(counts[:-1]).pvalue > 1e-3
    assert torch.equal(loss.lower_level(levels[:-1]), levels[1:])
    law = scipy.stats.norm() if math.isinf(D) else scipy.stats.t(D)
    unit = (draws.scale * draws.z[:, 0]).numpy()
    assert scipy.stats.kstest(unit, law.cdf).pvalue > 1e-3


# ---- consistency tuning -------------------------------------------------------------------------

TESTERS = {  # bounded and falling, for at D = 2 states have no variance
    "even": lambda x, t: 1 / (1 + (x / t) ** 2) ** 2,
    "odd": lambda x, t: x / t / (1 + (x / t) ** 2) ** 2,
    "wave": lambda x, t: torch.sin(2 * x + 1) / (1 + (x / t) ** 2) ** 2,
}
LINE = torch.tensor([-0.8, 0.1, 0.6], dtype=torch.float64).reshape(3, 1)


def ect_gradient(D, h, stage, t, of_noise=None, boundary=0.0):
    """E[(f*(x_t) - f*(x_r)) h(x_t)]/(t - r), and the same of absolute values, as the loss has it.

    `boundary` is what the loss takes for the end of paths, 0.3 if it is right.

    f* + theta h is the network, and the gradient in theta is asked for: with a large c the distance
    is |f_t - f_r|^2 / (2c). Images are all pairs of a point and a value of the noise, of a scale.
    """
    flow = IdealFlow(D, LINE, end=0.3)
    n, weights = noise_on_a_line(D if of_noise is None else of_noise)
    y = LINE.repeat_interleave(len(n), dim=0)
    scale = torch.linspace(0.5, 2, len(y), dtype=torch.float64)
    draws = LossDraws(torch.full([len(y)], t - boundary, dtype=torch.float64),
                      n.repeat(3)[:, None] / scale[:, None], scale)
    c = 1e3
    loss = ConsistencyTuningLoss(k=0.0, c=c, stage_nimg=1.0, boundary=boundary,
                                 **kernel_options(D))
    theta = torch.zeros(len(y), 1, dtype=torch.float64, requires_grad=True)

    def net(x, sigma, labels):
        return flow.solve(x, sigma) + theta * h(x, sigma)

    loss(net, y, draws=draws, nimg=stage).sum().backward()
    each = c * theta.grad[:, 0] * weights.repeat(3) / 3
    return each.sum().item(), each.abs().sum().item()


@pytest.mark.parametrize("h", TESTERS.values(), ids=TESTERS)
@pytest.mark.parametrize("D", DIMS)
def test_ect_has_no_gradient_at_the_exact_function_as_its_levels_meet(D, h):
    for t in (0.7, 2.0):
        far, near = (ect_gradient(D, h, stage, t) for stage in (3, 8))
        # What is left is of first order in t - r, which falls by 2^5.
        assert abs(near[0]) < 1.5e-3 * near[1] and abs(near[0]) < abs(far[0]) / 16 + 1e-4 * far[1]


@pytest.mark.parametrize("D, of_noise", [(2, INF), (INF, 2)])
def test_ect_of_another_D_has_a_gradient_there(D, of_noise):
    value, size = ect_gradient(D, TESTERS["odd"], 8, 0.7, of_noise)
    assert abs(value) > 0.03 * size


@pytest.mark.parametrize("D", DIMS)
def test_ect_of_noise_that_is_not_shared_has_ever_more_gradient(D):
    flow, h = IdealFlow(D, LINE, end=0.3, steps=30), TESTERS["odd"]
    y = LINE[torch.arange(3000) % 3]
    loss = ConsistencyTuningLoss(k=0.0, c=1e3, stage_nimg=1.0, **kernel_options(D))
    draws = wide(loss.draw(y.shape, seeded(4)), torch.full([3000], 2.0))
    theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)

    def net(x, sigma, labels):
        return flow.solve(x, sigma) + theta * h(x, sigma)

    def other_noise(x, sigma, labels):
        return flow.solve(y + (x - y).roll(3, dims=0), sigma)  # of another image of the same point

    def gradient(stage, frozen):
        [slope] = torch.autograd.grad(
            1e3 * loss(net, y, draws=draws, nimg=stage, frozen=frozen).mean(), theta)
        return abs(slope.item())

    shared = gradient(8, None)
    assert shared < 0.05  # five standard errors, as 3000 images have them
    assert gradient(8, other_noise) > 20 * gradient(3, other_noise) > 20 * shared


@pytest.mark.parametrize("h", TESTERS.values(), ids=TESTERS)
@pytest.mark.parametrize("D", DIMS)
def test_ect_ends_at_the_boundary_with_the_state_there(D, h):
    # In the first stage r would be t/2, below 0.3: the end of the path is the target.
    far, near = (ect_gradient(D, h, 0, t, boundary=0.3) for t in (0.4, 0.3 + 0.1 / 32))
    assert abs(near[0]) < 5e-3 * near[1] and abs(near[0]) < abs(far[0]) / 16 + 1e-4 * far[1]


def test_ect_with_a_boundary_by_hand():
    net, seen = edm(boundary=0.4), []
    y = torch.randn(6, 3, 8, 8, generator=seeded(1))
    loss = ConsistencyTuningLoss(boundary=0.4)
    draws = LossDraws(torch.tensor([1e-4, 0.01, 0.3, 0.5, 2.0, 40.0]),
                      torch.randn(y.shape, generator=seeded(2)),
                      torch.tensor([0.5, 1.0, 1.5, 2.0, 1.0, 0.7]).double())

    def watched(x, sigma, labels):
        seen.append(sigma.flatten())
        return net(x, sigma)

    found = loss(watched, y, draws=draws, nimg=2 * 3_200_000)
    assert min(levels.min() for levels in seen) > 0.4
    t = (draws.sigma.double() + 0.4).reshape(-1, 1, 1, 1)
    r = (t * (1 - (1 + 8 / (1 + t.exp())) / 8)).clamp(min=0.4)
    noise = draws.z * draws.scale.reshape(-1, 1, 1, 1)
    # At the boundary itself the network says what its input is.
    gap = net(y + (t * noise).float(), t) - net(y + (r * noise).float(), r)
    expected = gap.flatten(1).norm(dim=1) / (t - r).flatten()
    torch.testing.assert_close(found, expected.float(), rtol=5e-3, atol=0)
    assert (r == 0.4).sum() == 3


def test_the_lower_level_is_the_published_one():
    loss = ConsistencyTuningLoss()
    t = torch.tensor([0.01, 1.0, 1.9459, 1.9460, 2.0, 10.0, 80.0], dtype=torch.float64)
    # 1 - (1 + 8/(1 + e^t))/2, with e^2 = 7.389056, is 1/2 - 4/8.389056 at t = 2; it is 0 at ln 7.
    expected = [0, 0, 0, 2 * (0.5 - 4 / 8.38905610), 10 * (0.5 - 4 / 22027.46579), 40.0]
    found = loss.lower_level(t, 0).tolist()
    assert 0 < found.pop(3) < 1e-4
    assert found == pytest.approx(expected, rel=1e-7)
    # Stage 2: an eighth of the bracket.
    assert loss.lower_level(t, 2 * 3_200_000)[5].item() == pytest.approx(
        10 * (1 - (1 + 8 / 22027.46579) / 8), rel=1e-9)
    hour = ConsistencyTuningLoss(q=256.0).lower_level(t, 0) / t
    assert hour[[1, 4, 6]].tolist() == pytest.approx(
        [1 - (1 + 8 / 3.71828183) / 256, 1 - (1 + 8 / 8.38905610) / 256, 1 - 1 / 256], rel=1e-8)
    other = ConsistencyTuningLoss(q=4.0, k=2.0, b=3.0).lower_level(torch.tensor([1.0]).double(), 0)
    assert other.item() == pytest.approx(1 - (1 + 2 / (1 + math.exp(3))) / 4, rel=1e-12)


def test_stages_follow_the_images():
    loss = ConsistencyTuningLoss()
    assert [loss.stage(nimg) for nimg in (0, 3_199_999, 3_200_000, 25_599_999, 25_600_000)] == [
        0, 0, 1, 7, 8]
    t = torch.tensor([80.0]).double()  # where the bend has gone
    gaps = [1 - loss.lower_level(t, s * 3_200_000).item() / 80 for s in range(8)]
    assert gaps == pytest.approx([2.0 ** -(s + 1) for s in range(8)], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stage", [0, 1, 7, 30, 2000])
def test_the_lower_level_is_from_0_to_below_t(stage, dtype):
    t = torch.logspace(-6, 5, 400, dtype=dtype)
    r = ConsistencyTuningLoss().lower_level(t, stage * 3_200_000)
    assert (r >= 0).all() and (r < t).all() and r.dtype == dtype
    # The difference keeps two digits, by which the loss is divided.
    assert ((t - r) / t).min() > 9e-6


def linear_case(D=INF):
    y = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]]).double()
    z = torch.tensor([[1.0, -2.0], [0.3, 0.4], [2.0, 1.0]]).double()
    scale = torch.tensor([1.5, 2.0, 0.5]).double()
    return y, LossDraws(torch.tensor([10.0, 2.5, 1.0]).double(), z, scale)


@pytest.mark.parametrize("c", [0.0, 0.3])
def test_ect_of_a_linear_network_by_hand(c):
    (y, draws), (a, b) = linear_case(), (0.7, 0.2)
    found = ConsistencyTuningLoss(c=c)(lambda x, sigma, labels: a * x + b * sigma, y, draws=draws)
    for i, t in enumerate((10.0, 2.5, 1.0)):
        noise = draws.z[i].numpy() * draws.scale[i].item()
        r = max(0.0, t * (1 - (1 + 8 / (1 + math.exp(t))) / 2))
        # Both ends are linear in the level; at r = 0 the image itself is the target.
        gap = (t - r) * (a * noise + b) if r else a * (y[i].numpy() + t * noise) + b * t \
            - y[i].numpy()
        norm = math.sqrt((gap**2).sum() + c**2) - c
        assert found[i].item() == pytest.approx(norm / (t - r), rel=1e-6)
    assert r == 0  # the last one denoises


def test_both_ends_of_ect_are_told_the_same():
    (y, draws), seen = linear_case(), []
    labels, condition = torch.eye(3), torch.ones(3, 1)

    def net(x, sigma, labels, condition):
        seen.append((labels, condition, sigma.shape))
        return x

    def frozen(*args, **kwargs):
        seen.append("frozen")
        return net(*args, **kwargs)

    ConsistencyTuningLoss()(net, y, labels, draws=draws, condition=condition, frozen=frozen)
    assert seen.pop(0) == "frozen" and len(seen) == 2
    assert all(a is labels and b is condition and shape == (3, 1) for a, b, shape in seen)


def test_a_network_without_a_level_0_denoises_there_without_nan():
    y, draws = linear_case()
    theta = torch.ones(1, requires_grad=True)
    seen = []

    def net(x, sigma, labels):
        seen.append(sigma.flatten().clone())
        return theta * x + (sigma.log() - sigma.log())  # nan at 0

    loss = ConsistencyTuningLoss()(net, y, draws=draws)
    loss.sum().backward()
    assert loss.isfinite().all() and theta.grad.isfinite().all()
    # The identity is wrong by the noise alone: t s |z| / t.
    assert loss[2].item() == pytest.approx(0.5 * math.sqrt(5), rel=1e-6)
    assert all((levels > 0).all() for levels in seen)


def test_the_gradient_is_that_of_the_upper_end_alone():
    y, draws = linear_case()
    for make in (lambda: ConsistencyTuningLoss(),
                 lambda: ConsistencyDistillationLoss(lambda x, sigma, labels: x / 2,
                                                     torch.tensor([10.0, 2.5, 1.0, 0.2]))):
        theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        other = torch.tensor(0.7, dtype=torch.float64)

        def net(x, sigma, labels, theta=theta):
            return theta * x + sigma

        def frozen(x, sigma, labels, other=other):
            return other * x + sigma

        [found] = torch.autograd.grad(make()(net, y, draws=draws).sum(), theta)
        [expected] = torch.autograd.grad(make()(net, y, draws=draws, frozen=frozen).sum(), theta)
        assert found == expected != 0

        # By differences in the upper end's weight only.
        def value(weight, frozen=frozen, make=make):
            def shifted(x, sigma, labels):
                return weight * x + sigma
            return make()(shifted, y, draws=draws, frozen=frozen).sum().item()
        assert found.item() == pytest.approx((value(0.7 + 1e-5) - value(0.7 - 1e-5)) / 2e-5,
                                             rel=1e-6)


class Masked(torch.nn.Module):
    """Drops half of its inputs, and keeps the masks."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def forward(self, x, sigma, labels):
        mask = torch.nn.functional.dropout(torch.ones_like(x), 0.5)
        self.masks.append(mask)
        return mask * x


@pytest.mark.parametrize("method", ["ect", "cd", "cd with a target"])
def test_both_ends_share_their_dropout_masks(method):
    y, draws = torch.ones(4, 1, 8, 8), None
    net, target = Masked(), Masked()
    teacher_masks = Masked()

    def teacher(x, sigma, labels):
        torch.rand(17)  # a teacher may draw what it likes
        return teacher_masks(x, sigma, labels)

    if method == "ect":
        loss = ConsistencyTuningLoss()
    else:
        loss = ConsistencyDistillationLoss(teacher, torch.tensor([80.0, 10, 1]),
                                           target if "target" in method else None)
    torch.manual_seed(5)
    for _ in range(2):
        loss(net, y, draws=draws)
    upper = net.masks if "target" in method else net.masks[1::2]
    lower = target.masks if "target" in method else net.masks[::2]
    assert len(upper) == len(lower) == 2
    for a, b in zip(upper, lower, strict=True):
        assert torch.equal(a, b) and 0.3 < a.count_nonzero() / a.numel() < 0.7
    assert not torch.equal(upper[0], upper[1])  # each call has others


def test_with_shared_masks_the_loss_is_as_that_of_the_masked_network():
    # For a network mask * x it is |mask * s z|: others would add |(mask - mask') y| / (t - r).
    y, net = 100 * torch.ones(2, 1, 8, 8), Masked()
    loss = ConsistencyTuningLoss(k=0.0)
    draws = LossDraws(torch.ones(2), torch.randn(y.shape, generator=seeded()), torch.ones(2))
    found = loss(net, y, draws=draws, nimg=6 * 3_200_000)
    expected = (net.masks[0] * draws.z).flatten(1).norm(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_distances_are_the_published_ones():
    a = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 1e-3]]).double()
    zero = torch.zeros(2, 3).double()
    assert distance(a, zero, 0.0).tolist() == pytest.approx([5, 1e-3], rel=1e-6)
    assert distance(a, zero, 12.0).tolist() == pytest.approx([1, 1e-6 / 24], rel=1e-4)


@pytest.mark.parametrize("c", [0.0, 0.1])
def test_a_distance_has_a_finite_gradient_where_both_ends_agree(c):
    a = torch.zeros(2, 3, requires_grad=True)
    distance(a, torch.tensor([[0.0, 0, 0], [1.0, 0, 0]]), c).sum().backward()
    assert a.grad[0].tolist() == [0, 0, 0]
    assert a.grad[1, 0].item() == pytest.approx(-1 / math.hypot(1, c), rel=1e-5)


# ---- the boundary -------------------------------------------------------------------------------

def edm(**options):
    torch.manual_seed(0)
    net = EDMPrecond(8, 3, model_type="SongUNet", model_channels=8, channel_mult=[1],
                     num_blocks=1, attn_resolutions=[], dropout=0.0, **options)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return net


@pytest.mark.parametrize("boundary", [0.002, 0.003, 0.5])
def test_with_a_boundary_the_network_is_the_identity_there(boundary):
    net, x = edm(boundary=boundary), torch.randn(2, 3, 8, 8, generator=seeded())
    for sigma in (boundary, torch.full([2], boundary), torch.tensor(boundary).double()):
        assert torch.equal(net(x, sigma), x)
    assert not torch.equal(net(x, 2 * boundary), x)
    # Song et al. 2023, appendix C, with sigma_data = 0.5 and sigma = b + 1.
    s = boundary + 1
    c_skip, c_out, c_in, c_noise = net.coefficients(torch.tensor(s))
    expected = (0.2, 0.5 / math.sqrt(s**2 + 0.25), 1 / math.sqrt(s**2 + 0.25), math.log(s) / 4)
    assert [float(c) for c in (c_skip, c_out, c_in, c_noise)] == pytest.approx(expected, abs=1e-6)


def test_a_boundary_of_evaluation_alone():
    net, x = edm(boundary=0.003, boundary_in_training=False), torch.randn(2, 3, 8, 8)
    plain = edm()
    assert not torch.equal(net.train()(x, 0.003), x)
    assert torch.equal(net.train()(x, 0.7), plain.train()(x, 0.7))
    assert torch.equal(net.eval()(x, 0.003), x)
    assert not torch.equal(net.eval()(x, 0.7), plain.eval()(x, 0.7))


def test_without_a_boundary_the_network_tends_to_the_identity_at_level_0():
    net, x = edm().eval(), torch.randn(2, 3, 8, 8, generator=seeded())
    gaps = [(net(x, sigma) - x).abs().max().item() for sigma in (1e-2, 1e-3, 1e-4)]
    # c_out falls as sigma, 1 - c_skip as its square.
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2] and gaps[2] < 1e-2


OLD_KEYS = {"class_name", "img_resolution", "img_channels", "label_dim", "use_fp16", "model_type",
            "pfgmpp", "sigma_min", "sigma_max", "sigma_data", "model_channels", "channel_mult",
            "num_blocks", "attn_resolutions", "dropout"}


def test_configurations_round_trip_and_old_ones_are_as_they_were():
    assert set(edm().config) == OLD_KEYS
    assert edm().few_step is None
    record = {"method": "cd", "levels": [80.0, 0.821]}
    net = edm(boundary=0.002, boundary_in_training=False, few_step=record)
    assert set(net.config) == OLD_KEYS | {"boundary", "boundary_in_training", "few_step"}
    again = build_network(net.config)
    assert again.config == net.config and again.config["few_step"] == record
    assert (again.boundary, again.boundary_in_training) == (0.002, False)
    assert again.few_step.levels == (80.0, 0.821) and again.few_step.method == "cd"
