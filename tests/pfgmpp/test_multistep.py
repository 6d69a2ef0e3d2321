"""Multistep solvers: their order, what they are exact for, how often they ask, what they refuse."""

import math

import numpy as np
import pytest
import torch

from pfgmpp.kernel import PerturbationKernel
from pfgmpp.samplers import SamplerConfig, sampler
from pfgmpp.schedules import edm_sigmas, given_sigmas
from pfgmpp.solvers import (
    ADAMS_BASHFORTH,
    MULTISTEP,
    SOLVERS,
    dpmpp2m,
    euler,
    heun,
    ipndm,
    num_evaluations,
    sigma_slope,
    unipc,
)
from sampling.sweeps import DENOISER_SOLVERS as NAMES

DIMS = (1, 2, 128, math.inf)
LOWEST = 0.02


class Ideal:
    """The ideal denoiser of spread data: it counts how often it is asked."""

    sigma_min, sigma_max = 0.0, math.inf

    def __init__(self, D, num=20):
        self.D, self.kernel, self.count = D, PerturbationKernel(D), 0
        rng = torch.Generator().manual_seed(0)
        self.data = 0.5 * torch.randn(num, 1, 1, 2, generator=rng, dtype=torch.float64)

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def __call__(self, x, sigma, class_labels=None):
        self.count += 1
        return self.kernel.posterior_mean(x.double(), sigma, self.data)


def grid(n, lowest=LOWEST, highest=80.0, rho=7.0):
    """EDM's grid of n levels, without the final 0."""
    ends = highest ** (1 / rho), lowest ** (1 / rho)
    return torch.linspace(*ends, n, dtype=torch.float64) ** rho


def starts(net):
    rng = torch.Generator().manual_seed(1)
    return 80.0 * torch.randn(12, 1, 1, 2, generator=rng, dtype=torch.float64)


# ----------------------------------------------------------------------------------- convergence

ORDERS = {"euler": (euler, 1), "heun": (heun, 2), "dpmpp2m": (dpmpp2m, 2), "unipc": (unipc, 3),
          **{f"ipndm{k}": (lambda *args, k=k: ipndm(*args, order=k), min(k, 2)) for k in (1, 2, 3)}}


@pytest.mark.long
@pytest.mark.parametrize("D", DIMS)
@pytest.mark.parametrize("name", ORDERS)
def test_errors_fall_at_the_order_of_the_solver(name, D):
    solver, order = ORDERS[name]
    net = Ideal(D)
    exact = unipc(net, starts(net), grid(4097))
    steps = np.array([64, 128, 256, 512])
    # The median: a start next to the border of two data points jumps from one to the other.
    errors = [(solver(net, starts(net), grid(n + 1)) - exact).abs().median().item() for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.35), (slope, errors)
    assert np.log2(errors[-2] / errors[-1]) == pytest.approx(order, abs=0.2), errors


# ------------------------------------------------------------------------------------- exactness

def states_of(solver, denoise, x, sigmas, **options):
    """Returns the states at all levels."""
    seen = []

    def watch(x, i):
        seen.append(x)
        return x, sigmas[i]
    final = solver(denoise, x, sigmas, watch, **options)
    return torch.stack([*seen, final])


@pytest.mark.parametrize("order", ADAMS_BASHFORTH)
def test_ipndm_is_exact_for_slopes_of_lower_degree_at_equal_steps(order):
    sigmas = torch.linspace(10.0, 0.5, 20, dtype=torch.float64)
    slope = np.polynomial.Polynomial([0.3, -1.0, 0.5, 0.1][:order])
    states = states_of(ipndm, lambda x, sigma: x - sigma * slope(sigma), torch.ones(1).double(),
                       sigmas, order=order)
    steps = (states[1:] - states[:-1]).flatten().numpy()
    true = np.diff(slope.integ()(sigmas.numpy()))
    assert np.allclose(steps[order - 1:], true[order - 1:], rtol=0, atol=1e-12)
    more = slope + np.polynomial.Polynomial([0.0] * order + [0.2])
    states = states_of(ipndm, lambda x, sigma: x - sigma * more(sigma), torch.ones(1).double(),
                       sigmas, order=order)
    steps, true = np.diff(states.flatten()), np.diff(more.integ()(sigmas.numpy()))
    assert np.abs(steps - true)[order - 1:].min() > 1e-4


def test_heun_is_exact_for_a_linear_slope_wherever_it_ends():
    sigmas, x = grid(6, lowest=0.1), torch.ones(1).double()
    slope = np.polynomial.Polynomial([0.3, -1.0])
    states = states_of(heun, lambda x, sigma: x - sigma * slope(sigma), x, sigmas)
    assert np.allclose(np.diff(states.flatten()), np.diff(slope.integ()(sigmas.numpy())))
    there_and_back = heun(lambda x, sigma: x - sigma * slope(sigma), states[-1], sigmas.flip(0))
    assert there_and_back.item() == pytest.approx(1.0, abs=1e-9)


def polynomial(denoised):
    """A denoiser whose image is a polynomial in -ln sigma."""
    return lambda x, sigma: torch.as_tensor(denoised(-sigma.log())).expand_as(x)


def exact_in_log_sigma(denoised, x, sigmas):
    """The states for D a polynomial in -ln sigma: x_t/sigma_t = x_s/sigma_s + int D e^l dl."""
    levels, whole = -np.log(sigmas.numpy()), denoised
    parts = sum((whole.deriv(k) if k else whole) * (-1) ** k for k in range(whole.degree() + 1))
    anti = parts(levels) * np.exp(levels)
    return sigmas.numpy() * (x / sigmas[0].item() + anti - anti[0])


def test_dpmpp2m_takes_what_two_extrapolate_to_the_middle_of_the_step():
    sigmas, x = grid(12, lowest=0.1), torch.full([1], 30.0, dtype=torch.float64)
    denoised = np.polynomial.Polynomial([0.3, -0.7])
    states = states_of(dpmpp2m, polynomial(denoised), x, sigmas).flatten().numpy()
    levels = -np.log(sigmas.numpy())
    middles = denoised((levels[1:] + levels[:-1]) / 2)
    middles[0] = denoised(levels[0])  # the first step has nothing to extrapolate from
    shrink = np.exp(-np.diff(levels))
    assert np.allclose(states[1:], shrink * states[:-1] + (1 - shrink) * middles, rtol=1e-12)


@pytest.mark.parametrize("solver", [dpmpp2m, unipc])
def test_solvers_in_log_sigma_are_exact_for_a_constant_image(solver):
    sigmas, x = grid(12, lowest=0.1), torch.full([1], 30.0, dtype=torch.float64)
    denoised = np.polynomial.Polynomial([0.3])
    states = states_of(solver, polynomial(denoised), x, sigmas).flatten()
    assert np.allclose(states, exact_in_log_sigma(denoised, 30.0, sigmas), rtol=1e-12)


@pytest.mark.parametrize("coefficients", [[0.3, -0.7], [0.3, -0.7, 0.2]])
def test_unipc_corrects_by_the_integral_of_a_parabola(coefficients):
    # The states at which it asks are predicted: the corrected ones follow from them by the rule
    # of dpmpp2m, and go from the second on from one to the next as the true solution does.
    sigmas, x = grid(12, lowest=0.1), torch.full([1], 30.0, dtype=torch.float64)
    denoised = np.polynomial.Polynomial(coefficients)
    predicted = states_of(unipc, polynomial(denoised), x, sigmas).flatten().numpy()
    levels, values = -np.log(sigmas.numpy()), denoised(-np.log(sigmas.numpy()))
    ratio = np.diff(levels)[1:] / np.diff(levels)[:-1]
    targets = values[1:-1] + np.diff(values)[:-1] * ratio / 2
    shrink = np.exp(-np.diff(levels))[1:]
    corrected = (predicted[2:] - (1 - shrink) * targets) / shrink  # at levels 1, 2, ...
    exact = exact_in_log_sigma(denoised, 30.0, sigmas)[1:-1]
    error = (corrected - exact) * np.exp(levels[1:-1])
    assert np.ptp(error) < 1e-9 * abs(error).max()
    first = corrected[0] - (np.exp(-levels[1] + levels[0]) * 30.0
                            + (1 - np.exp(-levels[1] + levels[0])) * values[:2].mean())
    assert abs(first) < 1e-10


@pytest.mark.parametrize("solver", MULTISTEP.values())
def test_one_data_point_is_reached_exactly(solver):
    y = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = 80 * torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    sigmas = torch.cat([grid(7, 0.002), torch.zeros(1).double()])
    assert (solver(lambda x, sigma: y.expand_as(x), x, sigmas) - y).abs().max() < 1e-11


def test_the_step_to_zero():
    net, sigmas = Ideal(math.inf), torch.cat([grid(9), torch.zeros(1).double()])
    asked = []

    def ask(x, sigma):
        asked.append((x, sigma))
        return net(x, sigma)

    for solver in (dpmpp2m, unipc):  # returns the denoised image
        final = solver(ask, starts(net), sigmas)
        assert final.equal(net(*asked[-1]))
    states = states_of(ipndm, net, starts(net), sigmas, order=2)  # extrapolates the slope
    last, before = (sigma_slope(net, states[i], sigmas[i]) for i in (-2, -3))
    torch.testing.assert_close(states[-1], states[-2] - sigmas[-2] * (1.5 * last - 0.5 * before))


# ------------------------------------------------------------------------- evaluations, seeds

def test_names_are_those_of_the_solvers():
    assert set(NAMES) == {*SOLVERS, *MULTISTEP} and NAMES[0] == "heun"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_evaluations_are_counted_as_they_are(name, n):
    net = Ideal(2.5, num=5)
    config = SamplerConfig(num_steps=n, solver=name)
    sampler(net, torch.ones(2, 1, 1, 2).double(), num_steps=n, solver=name)
    assert net.count == config.nfe == num_evaluations(name, n)


@pytest.mark.parametrize("name", MULTISTEP)
def test_an_image_depends_on_its_own_latent_alone(name):
    net = Ideal(2.5, num=5)
    latents = torch.randn(6, 1, 1, 2, generator=torch.Generator().manual_seed(3)).double()
    whole = sampler(net, latents, num_steps=6, solver=name)
    torch.testing.assert_close(sampler(net, latents[[4, 1]], num_steps=6, solver=name),
                               whole[[4, 1]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("D", DIMS)
def test_few_evaluations_come_closer_than_heun_does(D):
    net = Ideal(D)
    latents = starts(net) / 80
    exact = sampler(net, latents, num_steps=200)
    errors = {name: (sampler(net, latents, num_steps=n, solver=name) - exact).abs().mean()
              for name, n in (("heun", 5), ("ipndm", 9), ("dpmpp2m", 9), ("unipc", 9))}
    assert max(errors[name] for name in MULTISTEP) < errors["heun"] / 2, errors


# ---------------------------------------------------------------------------- levels of one's own

def test_levels_of_ones_own_take_the_place_of_a_grid():
    net, latents = Ideal(2.5, num=5), torch.ones(2, 1, 1, 2).double()
    levels = edm_sigmas(net, 9)[:-1].tolist()
    config = SamplerConfig(sigmas=levels)
    assert config.num_steps == 9 and config.nfe == 17
    for solver in NAMES:
        assert sampler(net, latents, sigmas=levels, solver=solver).equal(
            sampler(net, latents, num_steps=9, solver=solver))
    other = sampler(net, latents, sigmas=[80, 5, 0.1])
    assert not torch.allclose(other, sampler(net, latents, num_steps=3))


def test_levels_are_those_that_the_network_knows():
    net = Ideal(2.5, num=5)
    net.round_sigma = lambda sigma: torch.as_tensor(sigma).round()
    assert given_sigmas(net, [80.2, 9.6, 1.1]).tolist() == [80, 10, 1, 0]
    net.sigma_min = 0.5
    with pytest.raises(ValueError, match="sigmas=80 to 0.1: the network knows levels from"):
        given_sigmas(net, [80, 0.1])


@pytest.mark.parametrize("solver", ["dpmpp2m", "unipc"])
@pytest.mark.parametrize("settings", [
    {"num_steps": 5, "sigma_min": 1.0, "sigma_max": 1.0}, {"sigmas": [80, 1.2, 1.1, 0.6]}])
def test_equal_levels_are_refused_where_a_solver_divides_by_their_distance(solver, settings):
    net = Ideal(2.5, num=5)
    net.round_sigma = lambda sigma: torch.as_tensor(sigma).round()
    with pytest.raises(ValueError, match=f"rounds some of .* solver={solver} can't step"):
        SamplerConfig(solver=solver, **settings).check(net)
    for other in ("heun", "ipndm"):
        SamplerConfig(solver=other, **settings).check(net)
        assert sampler(net, torch.ones(1, 1, 1, 2).double(), solver=other,
                       **settings).isfinite().all()


@pytest.mark.parametrize("settings, words", [
    ({"num_steps": 7}, "num_steps=7 with sigmas"), ({"rho": 5.0}, "rho=5.0 with sigmas"),
    ({"sigma_max": 40.0}, "sigma_max=40.0 with sigmas"),
    ({"discretization": "vp"}, "discretization=vp with sigmas")])
def test_levels_of_ones_own_exclude_a_grid(settings, words):
    for call in (SamplerConfig, lambda **own: sampler(Ideal(2), torch.ones(1, 1, 1, 2), **own)):
        with pytest.raises(ValueError, match=words):
            call(sigmas=[80, 1], **settings)


@pytest.mark.parametrize("sigmas", ["80,1", 80.0, [80, "x"], [80, None]])
def test_levels_that_are_no_numbers_are_refused(sigmas):
    with pytest.raises(ValueError, match="must be a sequence of numbers"):
        SamplerConfig(sigmas=sigmas)


def test_ipndm_is_of_order_3_by_default():
    net, sigmas = Ideal(128), grid(9)
    assert ipndm(net, starts(net), sigmas).equal(ipndm(net, starts(net), sigmas, order=3))
    latents = starts(net) / 80
    assert sampler(net, latents, num_steps=9, solver="ipndm").equal(
        sampler(net, latents, num_steps=9, solver="ipndm", order=3))


@pytest.mark.parametrize("settings", [
    {"solver": "ipndm", "schedule": "vp"}, {"solver": "unipc", "scaling": "vp"},
    {"solver": "dpmpp2m", "S_churn": 4.0}, {"solver": "ipndm", "noise_alpha": 0.1},
    {"solver": "heun", "order": 3}, {"solver": "ipndm", "order": 0},
    {"solver": "ipndm", "order": 2.0}, {"num_steps": 3.5}])
def test_the_function_refuses_what_the_command_refuses(settings):
    with pytest.raises(ValueError):
        sampler(Ideal(2), torch.ones(1, 1, 1, 2).double(), **settings)


@pytest.mark.parametrize("levels, words", [
    ([], "falling"), ([math.inf, 1.0], "at most 1e"), ([1e7, 1.0], "at most 1e"),
    ([1.0, 2.0], "falling"), ([1.0, 1.0], "falling"), ([1.0, 0.0], "falling"),
    ([1.0, -1.0], "falling"),
    ([math.nan], "falling"), ([200.0, 1.0], "the network knows")])
def test_levels_that_cannot_be_are_refused(levels, words):
    net = Ideal(2.5, num=5)
    net.sigma_max = 100.0
    with pytest.raises(ValueError, match=words):
        SamplerConfig(sigmas=levels).check(net)


@pytest.mark.parametrize("settings, words", [
    ({"schedule": "vp"}, "schedule=vp: solver=ipndm solves the equation in sigma"),
    ({"scaling": "vp"}, "scaling=vp"), ({"S_churn": 1.0}, "S_churn=1.0: solver=ipndm uses earlier"),
    ({"noise_alpha": 0.1}, "noise_alpha=0.1"), ({"order": 5}, "order=5: must be one of 1, 2, 3, 4"),
    ({"solver": "heun", "order": 2}, "only ipndm has orders"),
    ({"solver": "magic"}, "solver=magic: must be one of euler, heun, ppfm, ipndm, dpmpp2m, unipc")])
def test_settings_that_break_a_solver_are_refused_with_the_reason(settings, words):
    with pytest.raises(ValueError, match=words):
        SamplerConfig(**{"solver": "ipndm", **settings}).check_solver()


@pytest.mark.parametrize("settings", [{"schedule": "linear"}, {"scaling": "none"}, {"order": 2}])
def test_settings_that_change_nothing_for_a_solver_are_taken(settings):
    SamplerConfig(solver="ipndm", **settings).check_solver()
