"""Sampling that starts at images: the last steps of a grid, blending, and where steps end."""

import math

import pytest
import torch

from pfgmpp.few_steps import FewStep
from pfgmpp.samplers import SamplerConfig, encode, generate_images, sampler

INF = math.inf
CPU = torch.device("cpu")


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Net:
    """A denoiser that is far from linear, counts its calls, and sees a condition."""

    sigma_min, sigma_max, label_dim, few_step = 0.0, INF, 0, None
    image_shape = (1, 4, 6)

    def __init__(self, D=64.0):
        self.D, self.calls = D, 0

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def __call__(self, x, sigma, class_labels=None, condition=None):
        self.calls += 1
        seen = 0 if condition is None else condition
        return torch.tanh(x / (1 + sigma) + 0.3 * x.roll(1, dims=-1) * sigma + seen)


# Levels of 8 steps from 380 to 0.002 with rho = 7, from the formula of EDM.
GRID = [(380 ** (1 / 7) + i / 7 * (0.002 ** (1 / 7) - 380 ** (1 / 7))) ** 7 for i in range(8)]


def test_the_grid_of_the_published_sampler():
    known = [380, 158.17, 58.061, 18.020, 4.4188, 0.75973, 0.071883, 0.002]
    torch.testing.assert_close(torch.tensor(GRID), torch.tensor(known), rtol=1e-4, atol=0)


def published(net, v, h, w, condition=None, is_wrong=False):
    """The sampler of the CT forks, written out: state = measurement, no noise, blended.

    With conditions their code evaluates the network at the first level twice: `is_wrong`.
    """
    x, kwargs = v, {} if condition is None else {"condition": condition}
    for i in range(h):
        t, t_next = GRID[7 - h + i], GRID[7 - h + i + 1]
        d = (x - net(x, t, **kwargs)) / t
        moved = x + (t_next - t) * d
        if i < h - 1:
            d_next = (moved - net(moved, t if is_wrong else t_next, **kwargs)) / t_next
            moved = x + (t_next - t) * (d + d_next) / 2
        x = w * moved + (1 - w) * v
    return x


@pytest.mark.parametrize("D", [64.0, INF])
@pytest.mark.parametrize("is_conditional", [False, True])
@pytest.mark.parametrize("solver", ["heun", "ppfm"])
@pytest.mark.parametrize("h, w", [(1, 0.7), (1, 1.0), (2, 0.7), (2, 1.0), (3, 0.4), (7, 0.9)])
def test_the_published_sampler_is_one_setting(D, is_conditional, solver, h, w):
    v = normal(2, 1, 4, 6)
    condition = v if is_conditional else None
    net = Net(D)
    found = sampler(net, normal(2, 1, 4, 6, seed=1), num_steps=8, sigma_max=380, init=v,
                    init_noise=0, last=h, blend=w, condition=condition, solver=solver)
    expected, other = (published(Net(D), v, h, w, condition, is_wrong)
                       for is_wrong in (solver == "ppfm", solver != "ppfm"))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.allclose(found, other) == (h == 1)
    config = SamplerConfig(num_steps=8, sigma_max=380, last=h, solver=solver)
    assert net.calls == 2 * h - 1 == config.nfe


def test_one_step_to_0_is_the_denoiser_at_the_level_before_the_lowest():
    v, net = normal(2, 1, 4, 6), Net()
    found = sampler(net, normal(2, 1, 4, 6, seed=1), num_steps=8, sigma_max=380, init=v,
                    init_noise=0, last=1, stop_sigma=0)
    torch.testing.assert_close(found, Net()(v, GRID[6]), rtol=1e-9, atol=1e-9)
    assert net.calls == 1


@pytest.mark.parametrize("solver", ["heun", "euler", "ipndm", "dpmpp2m", "unipc"])
def test_stop_sigma_ends_a_grid_above_0_and_sampling_on_from_there_reaches_0(solver):
    # The solution of the ODE for Gaussian data of deviation s: x ~ sqrt(s^2 + sigma^2).
    class Gaussian(Net):
        def __call__(self, x, sigma, class_labels=None, condition=None):
            return x * 0.25 / (0.25 + sigma**2)

    z, stop = normal(1, 1, 4, 6), 0.3
    found = sampler(Gaussian(INF), z, num_steps=400, sigma_max=10, sigma_min=0.301,
                    stop_sigma=stop, solver=solver)
    expected = 10 * z * ((0.25 + stop**2) / (0.25 + 100)) ** 0.5
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
def test_noise_at_the_start_is_scaled_by_init_noise(factor):
    states, v, z = [], normal(2, 1, 4, 6), normal(2, 1, 4, 6, seed=1)
    sampler(Net(), z, num_steps=3, sigma_max=0.5, init=v, init_noise=factor,
            watch=lambda x, sigma: states.append(x))
    torch.testing.assert_close(states[0], v + factor * 0.5 * z)


@pytest.mark.parametrize("solver, last", [("heun", 3), ("euler", 3)])
def test_states_are_blended_after_every_step_also_the_last(solver, last):
    v, states = normal(2, 1, 4, 6), []
    found = sampler(Net(), v, num_steps=5, sigma_max=2, init=v, init_noise=0, last=last, blend=0.0,
                    solver=solver, watch=lambda x, sigma: states.append(x))
    assert len(states) == last
    for state in (*states, found):
        torch.testing.assert_close(state, v)


def test_a_few_step_network_may_start_at_images_too():
    # PFCM's one step from the measurement: w f(v, s) + (1 - w) v.
    net, v = Net(), normal(2, 1, 4, 6)
    net.few_step = FewStep("cd", (80.0,))
    found = sampler(net, normal(2, 1, 4, 6, seed=1), solver="consistency", sigmas=[0.336], init=v,
                    init_noise=0, blend=0.7)
    torch.testing.assert_close(found, 0.7 * Net()(v, torch.tensor(0.336, dtype=torch.float64))
                               + 0.3 * v)


def test_samples_have_the_size_of_what_they_start_from():
    for size in ((4, 6), (5, 3), (9, 8)):
        v = normal(2, 1, *size).float()
        [batch] = generate_images(Net(), [[0, 1]], sampler=SamplerConfig(
            num_steps=3, sigma_max=0.5), device=CPU, inits=lambda seeds, v=v: v)
        assert batch.images.shape == v.shape
        z = torch.stack([torch.randn(1, *size, generator=torch.Generator().manual_seed(k))
                         for k in (0, 1)])
        scale = torch.ones(2, 1, 1, 1, dtype=torch.float64)
        for k in (0, 1):
            rng = torch.Generator().manual_seed(k)
            torch.randn(1, *size, generator=rng)
            scale[k] = (64 / (2 * torch._standard_gamma(
                torch.tensor([32.0], dtype=torch.float64), generator=rng))).sqrt()
        expected = sampler(Net(), scale * z, num_steps=3, sigma_max=0.5, init=v)
        torch.testing.assert_close(batch.images, expected, rtol=1e-6, atol=1e-6)


def test_images_and_conditions_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="samples of 6x4, but condition images are 5x4"):
        list(generate_images(Net(), [[0]], sampler=SamplerConfig(), device=CPU,
                             inits=lambda _: normal(1, 1, 4, 6),
                             conditions=lambda _: normal(1, 1, 4, 5)))


V = normal(1, 1, 4, 6)


@pytest.mark.parametrize("settings, words", [
    ({"last": 8, "num_steps": 8, "init": V}, "last=8: must be 1 or more and less than num_steps=8"),
    ({"last": 1, "num_steps": 1, "init": V}, "last=1: .* less than num_steps=1"),
    ({"stop_sigma": 0.0021}, r"stop_sigma=0\.0021: must be 0 or more and below 0\.002"),
    ({"stop_sigma": -1.0}, "stop_sigma=-1: must be 0 or more"),
    ({"last": 1, "num_steps": 8, "init": V, "stop_sigma": 0.1}, "below 0.03519"),
    ({"blend": 0.5}, r"blend=0\.5 without init"),
    ({"init_noise": 0.0}, r"init_noise=0\.0 without init"),
    ({"blend": 1.5, "init": V}, r"blend=1\.5: must be between 0 and 1"),
    ({"init_noise": -1.0, "init": V}, "init_noise=-1: must be 0 or more"),
    ({"init_noise": INF, "init": V}, "init_noise=inf: must be 0 or more, and finite"),
    ({"blend": 0.5, "init": V, "solver": "ipndm"}, "uses earlier steps, which blending makes"),
    ({"blend": 0.5, "init": V, "schedule": "vp"}, r"schedule=vp with blend=0\.5: the latter needs"),
    ({"last": 1, "init": V, "scaling": "vp", "schedule": "vp"}, "schedule=vp with last=1"),
], ids=str)
def test_settings_that_do_not_go_together_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        sampler(Net(), V, **settings)


@pytest.mark.parametrize("name, value", [("last", 2), ("stop_sigma", 0.001)])
def test_latents_are_found_by_whole_grids_only(name, value):
    config = SamplerConfig(**{name: value})
    with pytest.raises(ValueError, match=f"{name}={value}: encoding solves the equation"):
        config.check_encoding()
    assert encode(Net(INF), V, config=SamplerConfig(num_steps=4)).shape == V.shape


@pytest.mark.parametrize("name, value", [("last", 1), ("stop_sigma", 0.1)])
def test_few_step_networks_take_no_part_of_a_grid(name, value):
    net = Net()
    net.few_step = FewStep("cd", (80.0, 0.8))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        sampler(net, V, solver="consistency", num_steps=2, init=V, **{name: value})
