"""Sampling images of which a noisy measurement is known, at every D.

For data of M points, E[y|x,v] is a softmax, and v tells each point's share of the samples.
"""

import math

import pytest
import torch
from scripts import ROOT

from pfgmpp.few_steps import FewStep
from pfgmpp.kernel import PerturbationKernel
from pfgmpp.measurement import (
    METHODS,
    MeasuredDenoiser,
    denoise,
    downsample,
    inpaint,
    noise_variance,
)
from pfgmpp.networks import build_network
from pfgmpp.samplers import SamplerConfig, generate_images
from sampling.network_sampler import NetworkSampler

INF = math.inf
MASK = torch.zeros(4, 6, dtype=torch.float64)
MASK[:3, 1:4] = 1
OPERATORS = {"denoise": denoise(), "inpaint": inpaint(MASK), "downsample": downsample(2)}
CPU = torch.device("cpu")


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", OPERATORS)
def test_an_adjoint_is_that_of_its_operator_and_the_gain_is_that_of_both(name):
    operator = OPERATORS[name]
    y, u = normal(1, 2, 4, 6), normal(1, 2, 4, 6, seed=1)
    v = operator.apply(u)
    torch.testing.assert_close((operator.apply(y) * v).sum(), (y * operator.adjoint(v)).sum())
    torch.testing.assert_close(operator.apply(operator.adjoint(v)), operator.gain * v)
    torch.testing.assert_close(operator.apply(operator.inverse(v)), v)


def test_downsampling_takes_means_of_squares():
    y = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert downsample(2).apply(y).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


class Ideal:
    """The ideal denoiser of a finite set of points, with what samplers ask of a network."""

    sigma_min, sigma_max, label_dim, few_step, sigma_data = 0.0, INF, 0, None, 0.5

    def __init__(self, D, data, weights=None):
        self.D, self.data, self.image_shape = D, data, tuple(data.shape[1:])
        self.log_weights = torch.zeros(len(data)) if weights is None else weights.log()

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def log_joint(self, x, sigma):
        """The logarithm of p(y) p(x|y), up to a constant, [B, M]."""
        squared = (x[:, None] - self.data).flatten(2).square().sum(dim=2)
        if math.isinf(self.D):
            return self.log_weights - squared / (2 * sigma**2)
        N = self.data[0].numel()
        return self.log_weights - (N + self.D) / 2 * torch.log1p(squared / (sigma**2 * self.D))

    def __call__(self, x, sigma, class_labels=None):
        weights = self.log_joint(x, sigma).softmax(dim=1)
        return torch.einsum("bm,m...->b...", weights, self.data)


def log_likelihood(operator, v, sigma_v, data):
    return -(v - operator.apply(data)).flatten(1).square().sum(dim=1) / (2 * sigma_v**2)


def mean_given_both(D, data, x, sigma, log_v):
    """E[y|x,v] in closed form."""
    return Ideal(D, data, log_v.softmax(dim=0))(x, sigma)


def mean_by_gradient(net, x, sigma, log_v, variance):
    """D(x) + variance * grad_x log p(v|x), the gradient exact."""
    x = x.clone().requires_grad_()
    joint = net.log_joint(x, sigma)
    log_p = torch.logsumexp(joint + log_v, dim=1) - torch.logsumexp(joint, dim=1)
    gradient, = torch.autograd.grad(log_p.sum(), x)
    with torch.no_grad():
        denoised = net(x, sigma)
        return denoised + variance(x, denoised) * gradient


@pytest.mark.parametrize("name", OPERATORS)
def test_with_the_exact_gradient_it_is_the_posterior_mean_at_D_inf(name):
    data = 0.5 * normal(8, 1, 4, 6)
    operator = OPERATORS[name]
    log_v = log_likelihood(operator, operator.apply(data[:1]) + 0.1, 0.6, data)
    for sigma in (0.05, 0.5, 3.0):
        x = data[:4] + sigma * normal(4, 1, 4, 6, seed=2)
        found = mean_by_gradient(Ideal(INF, data), x, sigma, log_v,
                                 lambda x, y, s=sigma: noise_variance(x, y, s, INF))
        expected = mean_given_both(INF, data, x, sigma, log_v)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_at_finite_D_the_factor_is_the_variance_of_the_noise_at_hand_and_not_of_the_level():
    D, sigma, shape = 2.0, 0.5, (1, 12, 16)  # N = 192
    data = 0.5 * normal(64, *shape)
    kernel = PerturbationKernel(D)
    x = data[:32] + kernel.sample((32, *shape), sigma, torch.Generator().manual_seed(3)).double()
    net, log_v = Ideal(D, data), 0.5 * normal(64, seed=4)
    expected = mean_given_both(D, data, x, sigma, log_v) - net(x, sigma)
    moved = expected.flatten(1).norm(dim=1)

    def error(variance):
        found = mean_by_gradient(net, x, sigma, log_v, variance) - net(x, sigma)
        away = (found - expected).flatten(1).norm(dim=1)
        return (away / moved)[moved > 1e-3].median()

    right = error(lambda x, y: noise_variance(x, y, sigma, D))
    wrong = error(lambda x, y: torch.tensor(sigma**2))
    assert right < 0.3 < 0.6 < wrong


@pytest.mark.parametrize("D", [0.7, 2, 128])
def test_the_factor_is_the_mean_variance_of_noise_of_this_length(D):
    # Given its length, noise is Gaussian of variance v, inverse-gamma of shape (N+D)/2.
    N, sigma = 24, 0.4
    noise = normal(1, 1, 4, 6) * 0.9
    kernel = PerturbationKernel(D)
    scale = kernel.posterior_scale(noise.expand(200_000, -1, -1, -1), sigma,
                                   torch.Generator().manual_seed(0))
    shape = (N + D) / 2
    mean = (sigma * scale).square().mean() * (shape - 1) / shape  # 1/E[1/v] is b/a, E[v] b/(a-1)
    found = noise_variance(noise, torch.zeros_like(noise), sigma, D)
    torch.testing.assert_close(found.squeeze(), mean, rtol=0.01, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("sigma_v", [0.0, 0.3])
def test_for_gaussian_data_at_D_inf_both_methods_are_exact(name, method, sigma_v):
    class Gaussian:  # y ~ Normal(0, 0.7^2)
        sigma_data, D = 0.7, INF

        def __call__(self, x, sigma, class_labels=None):
            return x * 0.7**2 / (0.7**2 + sigma**2)

    operator, sigma = OPERATORS[name], 0.4
    x, v = normal(2, 1, 4, 6), operator.apply(normal(2, 1, 4, 6, seed=1))
    found = MeasuredDenoiser(Gaussian(), operator, v, sigma_v, method)(
        x, torch.tensor(sigma, dtype=torch.float64))
    # The normal equations of y given both, with A as a matrix.
    unit = torch.eye(24, dtype=torch.float64).reshape(24, 1, 4, 6)
    A = operator.apply(unit).flatten(1).T  # [n, 24]
    rows = A.abs().sum(dim=1) > 0
    A, values = A[rows], v.flatten(1)[:, rows]
    # Conditioning Normal(m, C): m + C A^T (A C A^T + s_v^2)^-1 (v - A m).
    mean = x.flatten(1) * 0.7**2 / (0.7**2 + sigma**2)
    C = 0.7**2 * sigma**2 / (0.7**2 + sigma**2)
    gain = C * A.T @ torch.linalg.inv(C * A @ A.T + sigma_v**2 * torch.eye(
        len(A), dtype=torch.float64))
    expected = mean + (values - mean @ A.T) @ gain.T
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("D", [2, 128, INF])
@pytest.mark.parametrize("name, sigma_v", [("denoise", 1.2), ("inpaint", 0.8),
                                           ("downsample", 0.4)])
def test_samples_are_nearer_to_the_true_posterior_than_without_the_measurement(D, name, sigma_v):
    data = 0.5 * normal(8, 1, 4, 6)
    operator, net = OPERATORS[name], Ideal(D, data)
    v = operator.apply(data[:1] + sigma_v * normal(1, 1, 4, 6, seed=5) * operator.gain**0.5)
    true = log_likelihood(operator, v, sigma_v, data).softmax(dim=0)

    def distance(denoiser):
        [batch] = generate_images(denoiser, [range(400)], sampler=SamplerConfig(num_steps=20),
                                  device=CPU)
        away = (batch.images[:, None] - data).flatten(2).norm(dim=2)
        assert away.min(dim=1).values.median() < 0.05  # the samples are data points
        shares = torch.bincount(away.argmin(dim=1), minlength=8) / 400
        return (shares - true).abs().sum() / 2

    unguided = distance(net)
    guided, projected = (distance(MeasuredDenoiser(net, operator, v.expand(400, -1, -1, -1),
                                                   sigma_v, method)) for method in METHODS)
    assert guided < 0.6 * unguided
    assert projected < unguided - 0.03


@pytest.mark.parametrize("method", METHODS)
def test_it_denoises_each_image_by_its_own_measurement_also_in_inference_mode(method):
    net = build_network({"class_name": "EDMPrecond", "img_resolution": 8, "img_channels": 1,
                         "label_dim": 2, "model_type": "SongUNet", "model_channels": 8,
                         "num_blocks": 1, "channel_mult": [1, 1], "pfgmpp": True, "D": 16,
                         "cond_channels": 1}).eval().requires_grad_(False)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    x, v, condition = (normal(3, 1, 8, 8, seed=seed) for seed in range(3))
    labels = torch.eye(2)[[0, 1, 0]]

    def of(rows):
        with torch.inference_mode():
            args = x[rows].clone(), torch.tensor(0.6), labels[rows].clone()
            measured = MeasuredDenoiser(net, denoise(), v[rows].clone(), 0.2, method)
            return measured(*args, condition=condition[rows].clone())

    together = of([0, 1, 2])
    assert together.dtype == torch.float64 and not together.requires_grad
    for k in range(3):
        torch.testing.assert_close(of([k]), together[[k]], rtol=1e-5, atol=1e-5)
    plain = net(x, 0.6, labels, condition=condition)
    closer = (together - v).flatten(1).norm(dim=1) < (plain - v).flatten(1).norm(dim=1)
    assert closer.all()


@pytest.mark.parametrize("D", [2.0, 128.0, INF])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_correction_by_guidance_is_at_most_twice_that_of_projection(D, name):
    """Whatever the derivative of the network; below that, guidance is the gradient itself."""
    operator, sigma = OPERATORS[name], 3.0
    x, v = normal(2, 1, 4, 6), operator.apply(normal(2, 1, 4, 6, seed=1))
    for slope in (1e-3, 1e3):
        class Steep:
            sigma_data = 0.5

            def __call__(self, x, sigma, class_labels=None, slope=slope, **_):
                return slope * (x - x.detach()) + x.detach() / 2

        Steep.D = D
        found, step = (MeasuredDenoiser(Steep(), operator, v, 0.1, method)(x, sigma) - x / 2
                       for method in ("guidance", "projection"))
        rho2 = noise_variance(x, x / 2, sigma, D)
        gradient = slope * rho2 * step / (rho2 * 0.25 / (rho2 + 0.25))
        short = gradient.flatten(1).norm(dim=1) <= 2 * step.flatten(1).norm(dim=1)
        assert short.all() == (slope < 1)
        if slope < 1:
            torch.testing.assert_close(found, gradient)
        else:
            torch.testing.assert_close(found, 2 * step)


@pytest.mark.parametrize("name", ["emoji16-128.pt", "emoji16-inf.pt"])
def test_guidance_by_a_trained_network_brings_images_nearer_to_the_truth(name):
    """In few steps from the highest level, where its derivative is far too large."""
    net = NetworkSampler.open(str(ROOT / "examples" / name), CPU).net
    how = {"sampler": SamplerConfig(num_steps=9), "device": CPU, "class_idx": 1}
    [truth] = generate_images(net, [[3, 4]], **how)
    truth = truth.images.to(torch.float64)
    v = truth + 0.3 * normal(*truth.shape)
    measured = MeasuredDenoiser(net, denoise(), v, 0.3)
    [sample] = generate_images(measured, [[0, 1]], **how)
    assert (sample.images - truth).square().mean().sqrt() < 0.29  # the measurement is 0.3 off


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="method='dps': must be one of guidance, projection"):
        MeasuredDenoiser(None, denoise(), torch.zeros(1), 1.0, "dps")
    with pytest.raises(ValueError, match="sigma_v=-1: must be 0 or more"):
        MeasuredDenoiser(None, denoise(), torch.zeros(1), -1.0)
    few = Ideal(INF, torch.zeros(1, 1, 1, 1))
    few.few_step = FewStep.of("cd")
    with pytest.raises(ValueError, match=r"a few-step network \(cd\) is not a denoiser"):
        MeasuredDenoiser(few, denoise(), torch.zeros(1), 1.0)
    for factor in (1, 0, 2.0):
        with pytest.raises(ValueError, match=f"downsample:{factor}: must be a whole number"):
            downsample(factor)
