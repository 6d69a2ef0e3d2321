"""The moving average of the weights against closed forms."""

import copy

import pytest
import torch

from training.ema import ema_beta, update_ema_

TAKE, SKIP = torch.tensor(0.0), torch.tensor(1.0)


class Module(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full([3], float(value)))
        self.frozen = torch.nn.Parameter(torch.full([2], 2.0 * value), requires_grad=False)
        self.inner = torch.nn.Linear(2, 2)
        self.register_buffer("buffer", torch.full([2], float(value)))
        self.register_buffer("count", torch.tensor(int(value)))
        with torch.no_grad():
            self.inner.weight.fill_(value)
            self.inner.bias.fill_(-value)


def test_distance_to_a_constant_halves_every_half_life():
    ema, net = Module(1), Module(0)
    halflife, batch = 1000, 8
    for step in range(1, 3 * halflife // batch + 1):
        # Far beyond the ramp-up.
        update_ema_(ema, net, ema_beta(10**6, batch, halflife), TAKE)
        if step * batch % halflife == 0:
            expected = 0.5 ** (step * batch / halflife)
            # Each float32 step rounds by 6e-8.
            torch.testing.assert_close(ema.weight, torch.full([3], expected), rtol=1e-4, atol=0)
            torch.testing.assert_close(ema.inner.bias, -ema.inner.weight[0], rtol=1e-6, atol=0)


def test_the_split_into_batches_does_not_change_the_decay():
    whole = ema_beta(10**6, 512, 500_000)
    assert ema_beta(10**6, 64, 500_000) ** 8 == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("nimg, batch, halflife", [
    (512, 512, 500_000), (10_000, 512, 500_000), (9_999_999, 256, 500_000),
    (10_000_000, 256, 500_000), (20_000_000, 512, 500_000), (64, 8, 0.7)])
def test_ramp_up_caps_the_half_life_at_a_twentieth_of_the_images_seen(nimg, batch, halflife):
    expected = 0.5 ** (batch / min(halflife, nimg / 20))
    assert ema_beta(nimg, batch, halflife) == pytest.approx(expected, rel=1e-12)


def test_without_ramp_up_the_half_life_holds_from_the_start():
    for nimg in (0, 100, 10**7):
        assert ema_beta(nimg, 1000, 1000, rampup_ratio=None) == pytest.approx(0.5)
    assert ema_beta(1000, 100, 1e9, rampup_ratio=0.5) == pytest.approx(0.5 ** (100 / 500))


def test_the_average_is_the_network_after_the_first_step():
    assert ema_beta(0, 512, 500_000) == 0
    ema, net = Module(1), Module(3)
    update_ema_(ema, net, ema_beta(0, 512, 500_000), TAKE)
    for a, b in zip(ema.parameters(), net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_average_is_the_network_to_rounding_whatever_it_was_before():
    torch.manual_seed(0)
    ema, net = torch.nn.Linear(50, 40), torch.nn.Linear(50, 40)
    update_ema_(ema, net, 0.0, TAKE)
    # a + (b - a) rounds to a unit in the last place.
    torch.testing.assert_close(ema.weight, net.weight, rtol=0, atol=3e-8)


def test_a_half_life_of_zero_follows_the_network():
    assert ema_beta(10**6, 8, 0.0) == 0


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.99, 1.0])
def test_update_is_the_convex_combination_of_parameters(beta):
    torch.manual_seed(0)
    ema, net = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4)
    before, target = copy.deepcopy(ema), copy.deepcopy(net)
    update_ema_(ema, net, beta, TAKE)
    for new, old, goal, source in zip(ema.parameters(), before.parameters(), target.parameters(),
                                      net.parameters(), strict=True):
        torch.testing.assert_close(new, beta * old + (1 - beta) * goal, rtol=1e-6, atol=1e-7)
        assert torch.equal(goal, source)  # the network itself is left alone


def test_frozen_parameters_are_averaged_too():
    ema, net = Module(1), Module(3)
    update_ema_(ema, net, 0.5, TAKE)
    assert torch.equal(ema.frozen, torch.full([2], 4.0))


def test_buffers_are_copied_whatever_the_decay():
    ema, net = Module(1), Module(3)
    update_ema_(ema, net, 0.999, TAKE)
    assert torch.equal(ema.buffer, net.buffer) and torch.equal(ema.count, net.count)
    net.buffer.add_(1)
    assert not torch.equal(ema.buffer, net.buffer)  # a copy, not the same memory


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_skipped_step_leaves_the_average_untouched(beta):
    ema, net = Module(1), Module(3)
    before = copy.deepcopy(ema)
    update_ema_(ema, net, beta, SKIP)
    for a, b in zip(ema.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_average_stays_out_of_autograd():
    ema, net = Module(1), Module(3)
    update_ema_(ema, net, 0.5, TAKE)
    assert all(p.grad_fn is None for p in ema.parameters())
