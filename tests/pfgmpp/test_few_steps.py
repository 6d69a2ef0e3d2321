"""Sampling in a few evaluations: levels, noise between evaluations, seeds, and records."""

import math

import pytest
import scipy.optimize
import scipy.stats
import torch
from ideal_flow import IdealFlow

from checkpoints.published import check_network
from pfgmpp.few_steps import FewStep, consistency, few_step_levels
from pfgmpp.kernel import PerturbationKernel
from pfgmpp.networks import EDMPrecond
from pfgmpp.samplers import SamplerConfig, generate_images

INF = math.inf
DIMS = (2, 128, INF)
CPU = torch.device("cpu")


class Net:
    """What samplers need of a network, around a function of (x, sigma)."""

    label_dim, sigma_min, sigma_max = 0, 0.0, INF

    def __init__(self, f, D=INF, shape=(3, 1, 2), few_step=None):
        self.f, self.D, self.image_shape, self.few_step = f, D, shape, few_step

    def __call__(self, x, sigma, class_labels=None):
        return self.f(x, sigma)

    @staticmethod
    def round_sigma(sigma):
        return torch.as_tensor(sigma)


ECT = FewStep.of("ect")


def sample(net, seeds, config=None, batch=None):
    """Returns the images, and the states and levels of each evaluation."""
    config = config or SamplerConfig.of_few_steps(net.few_step)
    config.check(net)
    seeds, states = list(seeds), []
    batch = batch or len(seeds)
    batches = [seeds[i:i + batch] for i in range(0, len(seeds), batch)]
    images = [found.images for found in generate_images(
        net, batches, sampler=config, device=CPU,
        watch=lambda x, sigma: states.append((x.clone(), float(sigma))))]
    return torch.cat(images), states


# ---- noise between evaluations ------------------------------------------------------------------

def radial_p(squared, N, D):
    """The p-value of |n|^2 / (N sigma^2), which is F(N, D), and chi^2_N / N at D = inf."""
    law = scipy.stats.chi2(N, scale=1 / N) if math.isinf(D) else scipy.stats.f(N, D)
    return scipy.stats.kstest(squared.numpy(), law.cdf).pvalue


@pytest.mark.parametrize("D", DIMS)
def test_noise_between_evaluations_is_of_the_kernel_with_a_radius_of_its_own(D):
    x0 = torch.tensor([0.3, -0.7, 0.1, 0.9, -0.2, 0.5], dtype=torch.float64).reshape(3, 1, 2)
    net = Net(lambda x, sigma: x0.expand(x.shape), D, few_step=ECT)
    images, states = sample(net, range(3000), SamplerConfig.of_few_steps(ECT, 3))
    assert [level for _, level in states] == pytest.approx([80, 1.642, 0.4105])
    assert torch.equal(images, x0.expand(images.shape))
    directions, radii = [], []
    for i, (x, sigma) in enumerate(states):
        n = (x - (x0 if i else 0)).flatten(1) / sigma
        squared = n.square().mean(dim=1)
        assert radial_p(squared, 6, D) > 1e-3
        directions.append(n[:, 0] / n.norm(dim=1))
        radii.append(squared)
        if D == 2:  # a Gaussian has other radii
            z = torch.randn(3000, 6, generator=torch.Generator().manual_seed(i)).double()
            assert radial_p(z.square().mean(dim=1), 6, D) < 1e-20
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert scipy.stats.spearmanr(directions[i], directions[j]).pvalue > 1e-3
        assert scipy.stats.spearmanr(radii[i], radii[j]).pvalue > 1e-3


@pytest.mark.parametrize("D", DIMS)
def test_each_state_is_the_image_before_it_plus_its_levels_noise(D):
    net = Net(lambda x, sigma: x / (1 + sigma), D, few_step=ECT)
    seeds = [3, 11]
    images, states = sample(net, seeds)
    assert [level for _, level in states] == [80, 0.821]
    for row, seed in enumerate(seeds):
        # The order of a seed's draws: z, chi^2; then, between evaluations, z and chi^2 again.
        rng = torch.Generator().manual_seed(seed)

        def scale(rng=rng):
            if math.isinf(D):
                return 1.0
            half = torch.full([1], D / 2, dtype=torch.float64)
            return math.sqrt(D / (2 * torch._standard_gamma(half, generator=rng).item()))

        z = torch.randn([3, 1, 2], generator=rng).double()
        first = 80 * scale() * z
        z = torch.randn([3, 1, 2], generator=rng, dtype=torch.float64)
        second = first / 81 + 0.821 * scale() * z
        torch.testing.assert_close(states[0][0][row], first, rtol=1e-12, atol=0)
        torch.testing.assert_close(states[1][0][row], second, rtol=1e-12, atol=0)
        torch.testing.assert_close(images[row], second / 1.821, rtol=1e-12, atol=0)


@pytest.mark.parametrize("D", DIMS)
def test_an_image_depends_on_its_seed_alone(D):
    net = Net(lambda x, sigma: x / (1 + sigma), D, few_step=ECT)
    config = SamplerConfig.of_few_steps(ECT, 4)
    expected, _ = sample(net, range(12), config)
    for batch in (1, 5):
        assert torch.equal(sample(net, range(12), config, batch)[0], expected)
    order = [7, 0, 11, 3]
    assert torch.equal(sample(net, order, config)[0], expected[order])


@pytest.mark.parametrize("D", DIMS)
def test_a_seed_starts_where_ordinary_sampling_does(D):
    few, plain = (Net(lambda x, sigma: x / (1 + sigma), D, few_step=record)
                  for record in (ECT, None))
    _, states = sample(few, range(5))
    _, others = sample(plain, range(5), SamplerConfig(num_steps=3))
    assert torch.equal(states[0][0], others[0][0]) and states[0][1] == others[0][1] == 80


@pytest.mark.parametrize("D", DIMS)
@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_exact_consistency_function_gives_points_of_the_seeds_own_cluster(D, num_steps):
    shape = (1, 1, 4)
    mu = torch.tensor([0.5, -0.25, 0.75, 0.1], dtype=torch.float64).reshape(shape)
    flow = IdealFlow(D, torch.stack([mu, -mu]), end=0.02, steps=120)

    def exact(x, sigma):
        return flow.denoise(flow.solve(x, sigma), flow.end)

    net = Net(exact, D, shape, ECT)
    images, states = sample(net, range(200), SamplerConfig.of_few_steps(ECT, num_steps))
    # By symmetry no path crosses the plane between the clusters.
    side = ((states[-1][0] * mu).sum(dim=(1, 2, 3)) > 0).double() * 2 - 1
    torch.testing.assert_close(images, side.reshape(-1, 1, 1, 1) * mu, rtol=0, atol=0.01)
    assert scipy.stats.binomtest(int((side > 0).sum()), 200).pvalue > 1e-3
    # The denoiser's one evaluation at 80 is about the mean of both, which is no data.
    blurred, _ = sample(Net(flow.denoise, D, shape, ECT), range(200),
                        SamplerConfig.of_few_steps(ECT, 1))
    assert blurred.flatten(1).norm(dim=1).median() < 0.1 * mu.norm()


# ---- levels -------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, num_steps, levels", [
    ("ect", 1, [80]), ("cd", 1, [80]), ("ect", 2, [80, 0.821]), ("cd", 2, [80, 0.821]),
    ("ect", 3, [80, 1.642, 0.4105]), ("cd", 4, [80, 3.284, 0.821, 0.20525]),
    ("ipfm", 1, [80]), ("ipfm", 2, [80, 40.001]), ("ipfm", 4, [80, 60.0005, 40.001, 20.0015])])
def test_levels_are_the_published_ones_and_their_rule(method, num_steps, levels):
    assert few_step_levels(method, 80.0, num_steps) == pytest.approx(levels, rel=1e-12)
    assert FewStep.of(method).of_steps(num_steps) == pytest.approx(levels, rel=1e-12)


def test_levels_of_other_ranges_keep_their_proportions():
    assert few_step_levels("ect", 380.0, 2) == pytest.approx([380, 380 / 80 * 0.821])
    assert few_step_levels("ipfm", 2.5, 2) == pytest.approx([2.5, 1.251])


@pytest.mark.parametrize("method", ["ect", "cd", "ipfm"])
def test_levels_of_any_number_fall_from_the_highest(method):
    for num_steps in range(1, 65):
        levels = few_step_levels(method, 80.0, num_steps)
        assert len(levels) == num_steps and levels[0] == 80 and levels[-1] > 0.002
        assert all(a > b for a, b in zip(levels, levels[1:], strict=False))
        assert FewStep(method, levels).levels == levels


@pytest.mark.parametrize("num_steps", [0, -1, 65, 2.5, 2.0, True, None, "2"])
def test_other_numbers_of_steps_are_refused(num_steps):
    with pytest.raises(ValueError, match="num_steps=.*must be 1 to 64"):
        few_step_levels("ect", 80.0, num_steps)


def test_the_usual_number_of_steps_is_the_methods():
    assert [len(FewStep.of(method).levels) for method in ("ect", "cd", "ipfm")] == [2, 2, 1]
    assert FewStep.of("ipfm", 2.5).levels == (2.5,)


def test_recorded_levels_are_kept_and_other_numbers_follow_the_rule():
    record = FewStep("ect", (70, 0.5))
    assert record.of_steps(2) == (70.0, 0.5)
    assert record.of_steps(3) == pytest.approx([70, 70 * 1.642 / 80, 70 * 0.4105 / 80])
    assert FewStep.from_dict(record.to_dict()) == record
    assert record.to_dict() == {"method": "ect", "levels": [70.0, 0.5]}


HOSTILE = [
    5, "ect", [], ["method", "levels"], {}, {"method": "ect"}, {"levels": [80.0]}, torch.ones(2),
    None, {"method": torch.ones(2), "levels": [80.0]}, {"method": "ect", "levels": torch.ones(1)},
    *({"method": method, "levels": [80.0]} for method in ("ECT", "", None, 3, ["ect"], {})),
    *({"method": "ect", "levels": levels} for levels in (
        [], None, 5, "80", "95", ["80"], [None], [[80.0]], [80.0, 80.0], [0.5, 80.0], [80.0, 0.0],
        [80.0, -1.0], [0.0], [math.nan], [80.0, math.nan], [INF], [-INF], [True], [10**400],
        {80.0: 1}, {80.0}, [80.0 - i for i in range(65)]))]


@pytest.mark.parametrize("record", HOSTILE, ids=str)
def test_hostile_records_are_refused_in_one_line(record):
    net = EDMPrecond(8, 3, model_type="SongUNet", model_channels=8, channel_mult=[1],
                     num_blocks=1, few_step=ECT.to_dict())
    config, tensors = net.config, net.state_dict()
    check_network(config, tensors)
    with pytest.raises(ValueError) as error:
        check_network(config | {"few_step": record}, tensors)
    assert "\n" not in str(error.value) and "few_step" in str(error.value)
    with pytest.raises(ValueError) as error:
        FewStep.from_dict(record)
    assert "\n" not in str(error.value) and "few_step" in str(error.value)


# ---- settings -----------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [
    {"S_churn": 5.0}, {"schedule": "vp"}, {"scaling": "vp"}, {"noise_alpha": 0.1},
    {"sigma_min": 0.01}, {"sigma_max": 40.0}, {"rho": 5.0}, {"discretization": "iddpm"},
    {"order": 2}, {"num_steps": 2.5}], ids=str)
def test_the_solver_of_few_steps_refuses_what_it_has_no_use_for(settings):
    config = SamplerConfig(**{"num_steps": 2, "solver": "consistency"} | settings)
    with pytest.raises(ValueError, match=next(iter(settings))):
        config.check(Net(lambda x, sigma: x, few_step=ECT))


@pytest.mark.parametrize("solver", [None, "heun", "euler", "ipndm", "dpmpp2m"])
def test_a_few_step_network_refuses_solvers(solver):
    net = Net(lambda x, sigma: x, few_step=ECT)
    with pytest.raises(ValueError, match=r"a few-step network \(ect\) is not a denoiser"):
        SamplerConfig(num_steps=2, solver=solver).check(net)


def test_another_network_needs_levels_for_a_few_steps():
    net = Net(lambda x, sigma: x / (1 + sigma))
    with pytest.raises(ValueError, match="records no levels"):
        SamplerConfig(num_steps=2, solver="consistency").check(net)
    config = SamplerConfig(solver="consistency", sigmas=(10.0, 1.0))
    assert [level for _, level in sample(net, [0], config)[1]] == [10, 1]


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_the_network_is_evaluated_once_a_level(num_steps):
    calls = []

    def f(x, sigma):
        calls.append(float(sigma))
        return 0 * x

    for config in (SamplerConfig.of_few_steps(ECT, num_steps),
                   SamplerConfig(num_steps=num_steps, solver="consistency")):
        calls.clear()
        sample(Net(f, few_step=ECT), [0], config)
        assert config.nfe == num_steps == len(calls)
        assert calls == list(few_step_levels("ect", 80.0, num_steps))


# Shares of the rarer point after Gaussian noise: sums of F(b) and of the normal law at the border b
# between the points, worked out by hand below.
@pytest.mark.parametrize("D, gaussian", [(2, 0.1491), (8, 0.1867), (128, 0.1992)])
def test_only_noise_of_the_kernel_keeps_the_shares_of_two_points(D, gaussian):
    """Data -1 and 1 with shares 0.2 and 0.8: in one dimension f maps quantiles to quantiles."""
    share, n, rng = 0.2, 400_000, torch.Generator().manual_seed(0)

    def border(sigma):  # below it lies the share of -1, of all states of this level
        law = scipy.stats.t(D)

        def excess(x):
            return share * law.cdf((x + 1) / sigma) + 0.8 * law.cdf((x - 1) / sigma) - share
        return scipy.optimize.brentq(excess, -1e4, 1e4)

    borders = {sigma: border(sigma) for sigma in (80.0, 0.821)}

    def exact(x, sigma):
        return torch.where(x < borders[round(float(sigma), 3)], -1.0, 1.0).to(x.dtype)

    def kernel(x):
        return PerturbationKernel(D).sample(tuple(x.shape), 1.0, rng).to(x.dtype)

    y = torch.where(torch.rand([n, 1], generator=rng) < share, -1.0, 1.0).double()
    start = y + 80 * kernel(y)
    levels = torch.tensor([80, 0.821, 0], dtype=torch.float64)
    for noise, expected in ((kernel, share), (lambda x: torch.randn(
            x.shape, generator=rng, dtype=x.dtype), gaussian)):
        found = (consistency(exact, start, levels, noise) < 0).double().mean().item()
        assert abs(found - expected) < 5 * math.sqrt(share / n) + 1e-4
    law = scipy.stats.norm
    low, high = ((borders[0.821] - point) / 0.821 for point in (-1, 1))
    assert share * law.cdf(low) + 0.8 * law.cdf(high) == pytest.approx(gaussian, abs=1e-4)
