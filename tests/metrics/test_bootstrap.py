"""The bootstrap of the Frechet distance: scipy, derivatives, replicates, many simulated sets."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from metrics import bootstrap
from metrics.bootstrap import bootstrap_frechet


def frechet_by_sqrtm(x, mu, sigma, weights=None):
    """The distance of images x [m, d], or of as many with these weights; unbiased covariances."""
    weights = np.ones(len(x)) if weights is None else weights
    mean = weights @ x / weights.sum()
    own = (weights[:, None] * (x - mean)).T @ (x - mean) / (weights.sum() - 1)
    return (np.square(mean - mu).sum()
            + np.trace(own + sigma - 2 * scipy.linalg.sqrtm(own @ sigma).real))


def frechet_of_many(x, sigma):
    """Frechet distances of sets x [sets, m, d] to Normal(0, sigma), by the roots of eigenvalues."""
    means = x.mean(1)
    centred = x - means[:, None]
    own = np.einsum("smi,smj->sij", centred, centred) / (x.shape[1] - 1)
    roots = np.sqrt(np.linalg.eigvals(own @ sigma).real.clip(0)).sum(1)
    return np.square(means).sum(1) + np.trace(own, axis1=1, axis2=2) + np.trace(sigma) - 2 * roots


def some_case(m, d, rank, seed=0):
    rng = np.random.default_rng(seed)
    root = rng.standard_normal([d, rank])
    x = rng.standard_normal([m, d]) @ rng.standard_normal([d, d]) + 0.5
    return torch.from_numpy(x), rng.standard_normal(d), root @ root.T


@pytest.mark.parametrize("m, d, rank", [(60, 6, 6), (60, 6, 3), (10, 30, 30), (10, 30, 4)])
def test_the_value_is_the_distance_for_every_rank(monkeypatch, m, d, rank):
    monkeypatch.setattr(bootstrap, "_CHUNK_ROWS", 7)
    x, mu, sigma = some_case(m, d, rank)
    found = bootstrap_frechet(x, mu, sigma, draws=40)
    assert found.value == pytest.approx(frechet_by_sqrtm(x.numpy(), mu, sigma), rel=1e-6)
    assert found.low < found.value < found.high


@pytest.mark.parametrize("rank", [4, 2])
def test_influences_are_derivatives_by_the_weights_of_the_images(monkeypatch, rank):
    """By central differences: m images, one of them with a little more weight than the others.

    They differ in how many images the covariance is divided by: 1 in 200.
    """
    monkeypatch.setattr(bootstrap, "_CHUNK_ROWS", 70)
    x, mu, sigma = some_case(200, 4, rank)
    _, psi = bootstrap._influences(x, mu, sigma, "cpu")

    def at(i, step):
        weights = np.full(200, 1 - step / 200)
        weights[i] += step
        return frechet_by_sqrtm(x.numpy(), mu, sigma, weights)

    expected = [200 * (at(i, 1e-3) - at(i, -1e-3)) / 2e-3 for i in range(0, 200, 20)]
    np.testing.assert_allclose(psi[::20], expected, atol=0.006 * np.abs(psi).max())
    assert psi.mean() == pytest.approx(0, abs=1e-9)


def test_the_standard_error_is_that_of_replicates_where_bias_is_small():
    """Scores of images that are drawn again: 400 replicates leave 3.5%, one standard deviation."""
    x, mu, sigma = some_case(2000, 4, 4)
    rng = np.random.default_rng(0)
    replicates = [frechet_by_sqrtm(x.numpy()[rng.integers(2000, size=2000)], mu, sigma)
                  for _ in range(400)]
    found = bootstrap_frechet(x, mu, sigma)
    assert found.std_error == pytest.approx(np.std(replicates), rel=0.12)
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.std_error, rel=0.1)


# Features, images, mean, deviation; the least and the largest standard error over the true one.
CASES = {"little bias": (3, 400, 0.4, 1.2, 0.93, 1.1), "bias of half": (16, 150, 0.1, 1.25, 1, 1.3),
         "as many features as images": (24, 24, 0.2, 1.5, 1, 1.35)}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_the_interval_holds_the_mean_score_in_95_of_100_cases(case):
    """Over 300 sets, one standard deviation is 1.3%; the mean score is that of 2000 other sets."""
    d, m, mean, deviation, least, most = CASES[case]
    rng, mu, sigma = np.random.default_rng(0), np.zeros(d), np.eye(d)
    scores = np.concatenate([frechet_of_many(
        mean + deviation * rng.standard_normal([500, m, d]), sigma) for _ in range(4)])
    sets = torch.from_numpy(mean + deviation * rng.standard_normal([300, m, d]))
    found = [bootstrap_frechet(x, mu, sigma, draws=100, seed=i) for i, x in enumerate(sets)]
    assert 0.915 < np.mean([part.low <= scores.mean() <= part.high for part in found]) < 0.99
    assert least < np.mean([part.std_error for part in found]) / scores.std() < most


@pytest.mark.long
def test_where_the_score_is_all_bias_the_error_is_too_large_by_root_two_at_most():
    """Images of the reference's own law: second order alone."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal([400, 200, 3])
    true = frechet_of_many(x, np.eye(3)).std()
    errors = [bootstrap_frechet(torch.from_numpy(part), np.zeros(3), np.eye(3), draws=40).std_error
              for part in x]
    assert np.sqrt(np.square(errors).mean()) == pytest.approx(math.sqrt(2) * true, rel=0.1)


def test_a_reference_of_equal_images_leaves_the_mean_and_the_trace():
    x = some_case(30, 4, 4)[0]
    found = bootstrap_frechet(x, np.zeros(4), np.zeros([4, 4]), draws=40)
    assert found.value == pytest.approx((x.mean(0).square().sum() + x.var(0).sum()).item())
    squares = x.square().sum(1)  # F is their mean, but for rounding and 1/m
    assert found.std_error == pytest.approx(squares.std().item() / math.sqrt(30), rel=0.05)


def test_the_seed_decides_the_interval_and_the_chunks_do_not(monkeypatch):
    args = some_case(90, 5, 5)
    first = bootstrap_frechet(*args)
    assert bootstrap_frechet(*args) == first
    other = bootstrap_frechet(*args, seed=1)
    assert other[:2] == first[:2] and other[2:] != first[2:]
    monkeypatch.setattr(bootstrap, "_CHUNK_ROWS", 11)
    assert bootstrap_frechet(*args) == pytest.approx(first, rel=1e-9)


@pytest.mark.parametrize("shape, draws, words", [
    ((1, 3), 40, "statistics of 1 images: at least 2 needed"),
    ((9, 4), 40, "statistics of 3 features can't be compared with those of 4"),
    ((9, 3), 39, "39 draws of a bootstrap: at least 40 needed")])
def test_what_can_not_be_drawn_from_is_refused(shape, draws, words):
    with pytest.raises(ValueError, match=words):
        bootstrap_frechet(torch.zeros(shape), np.zeros(3), np.eye(3), draws=draws)
