"""docs/extending.md: its program runs, and what it makes follows the data's law."""

import math
import re

import numpy as np
import pytest
import scipy.stats
import torch
from scripts import ROOT

from checkpoints import checkpoint
from metrics.metrics import METRICS
from pfgmpp.kernel import PerturbationKernel
from pfgmpp.loss import LOSSES, EDMLoss
from pfgmpp.networks import MODELS, EDMPrecond
from pfgmpp.samplers import SamplerConfig, draw_latents
from pfgmpp.solvers import SOLVERS, heun

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
INF = math.inf
SHORT = (1, 2, 128, INF)

pytestmark = pytest.mark.long


pytestmark = pytest.mark.slow  # the page trains a network


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The namespace after the page's program; what it registers is taken back at the end."""
    tables = MODELS, LOSSES, SOLVERS, METRICS
    before = [dict(table) for table in tables]
    values = {}
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("page")
        (folder / "examples").symlink_to(ROOT / "examples")
        patch.chdir(folder)
        exec(compile("\n".join(BLOCKS), "docs/extending.md", "exec"), values)
    yield values
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def distances(page, samples):
    """Returns the distance of each sample to its nearest mode, and which that is."""
    nearest = (samples[:, None] - page["MODES"].double()).norm(dim=2).min(dim=1)
    return nearest.values.numpy(), nearest.indices.numpy()


def test_the_first_program_is_short():
    assert len(BLOCKS) == 5 and len(BLOCKS[0].splitlines()) <= 60


@pytest.mark.parametrize("D", [INF, 8])
def test_samples_of_vectors_lie_about_the_modes_of_the_data(page, D):
    # The data lie within 0.3, three deviations, of a mode with probability 1 - exp(-4.5) = 0.989,
    # at a median of 0.1 sqrt(2 ln 2) = 0.118. The small network, trained for seconds, blurs a
    # little: it leaves 3 to 5% between modes. Points spread over the ring would have 0.22.
    distance, mode = distances(page, page["samples"][D])
    assert (distance < 0.3).mean() > 0.9
    assert np.median(distance) == pytest.approx(0.118, abs=0.03)
    # 500 samples in 8 modes: 62.5 each with deviation 7.4.
    assert np.bincount(mode, minlength=8) == pytest.approx(62.5, abs=4 * 7.4)


def test_an_untrained_network_fails_the_same_bounds(page):
    torch.manual_seed(0)
    untrained = EDMPrecond(1, 2, model_type="MLP", sigma_data=0.7)
    distance, _ = distances(page, page["sample"](untrained, 200))
    assert (distance < 0.3).mean() < 0.7


def test_a_class_of_networks_of_ones_own_is_saved_and_rebuilt(page):
    x = torch.randn(5, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = page["net"](x, 0.7)
        for net in (page["copy"], page["loaded"]):
            assert torch.equal(net(x, 0.7), expected)
    assert page["loaded"].D == 8 and page["loaded"].model_kwargs == {"width": 16}
    damaged = {**page["snapshot"], "network": {**page["net"].config, "width": 17}}
    with pytest.raises(ValueError, match="must be"):
        checkpoint.build_ema(damaged)
    with pytest.raises(ValueError, match="depth"):
        checkpoint.build_ema({**damaged, "network": {**page["net"].config, "depth": 3}})


@pytest.mark.parametrize("D", SHORT)
def test_a_loss_of_ones_own_has_the_law_it_says_at_every_D(page, D):
    loss_fn = page["LogUniformLoss"](sigma_data=0.7, pfgmpp=True, D=D)
    draws = loss_fn.draw((20_000, 2, 1, 1), torch.Generator().manual_seed(0))
    law = scipy.stats.loguniform(0.01, 10)
    assert scipy.stats.kstest(draws.sigma.double().numpy(), law.cdf).pvalue > 1e-3
    assert LOSSES["loguniform"] is page["LogUniformLoss"]


def test_a_sampler_of_ones_own_samples_the_same_law(page):
    distance, mode = distances(page, page["by_midpoint"].images.flatten(1))
    assert (distance < 0.3).mean() > 0.9
    # The same seeds start at the same points, and both solve the same equation.
    _, expected = distances(page, page["samples"][8])
    assert (mode == expected).mean() > 0.95


def test_a_metric_of_ones_own_is_scored_beside_the_others(page):
    mean = [page[name].get_scored(range(len(page[name]))).reshape(len(page[name]), -1).mean(axis=0)
            for name in ("data", "part")]
    expected = (((mean[0] - mean[1]) / 127.5) ** 2).sum()
    assert set(page["values"]) == {"fid", "mean_shift"}
    assert page["values"]["mean_shift"] == pytest.approx(expected, rel=1e-5)
    assert 0 < page["values"]["mean_shift"] < page["values"]["fid"]  # of which it is a part


# ---- [B, N] -------------------------------------------------------------------------------------

class Vectors(torch.nn.Module):
    """F(x) = A x, of [B, N] or [B, N, 1, 1]."""

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0):
        super().__init__()
        self.linear = torch.nn.Linear(in_channels, out_channels)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        return self.linear(x.flatten(1)).reshape(len(x), -1, *x.shape[2:])


@pytest.mark.parametrize("D", SHORT)
def test_vectors_pass_as_rows_and_as_images_of_one_pixel_alike(monkeypatch, D):
    monkeypatch.setitem(MODELS, "Vectors", Vectors)
    torch.manual_seed(0)
    net = EDMPrecond(1, 5, model_type="Vectors", pfgmpp=not math.isinf(D), D=D)
    loss_fn = EDMLoss(pfgmpp=not math.isinf(D), D=D)
    assert net.image_shape == (5, 1, 1) and net.N == 5
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    results = []
    for data in (rows, rows[:, :, None, None]):
        draws = loss_fn.draw(data.shape, torch.Generator().manual_seed(2))
        with torch.no_grad():
            loss = loss_fn(net, data, draws=draws)
            stable = loss_fn(net, data, draws=draws, reference=data)
            kernel = PerturbationKernel(D)
            noise = kernel.sample(data.shape, 0.5, torch.Generator().manual_seed(3))
            solved = heun(lambda x, sigma: net(x, sigma).double(), data.double(),
                          torch.tensor([3.0, 1.0, 0.1, 0.0], dtype=torch.float64))
        results.append([t.flatten(1) for t in (loss, stable, noise, solved)])
        assert loss.shape == data.shape == solved.shape
    for row, pixel in zip(*results, strict=True):
        torch.testing.assert_close(row, pixel)
    latents, _, _ = draw_latents(net, [0, 1], torch.device("cpu"))
    assert SamplerConfig(num_steps=2).sample(net, latents, None, None).shape == (2, 5, 1, 1)
