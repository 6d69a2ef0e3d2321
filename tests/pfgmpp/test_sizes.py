"""Images of any size: mirrored edges, tiles without seams, and noise of crops."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from pfgmpp.guidance import guided
from pfgmpp.kernel import PerturbationKernel
from pfgmpp.networks import build_network
from pfgmpp.sizes import Padding, TiledDenoiser, size_multiple


@pytest.mark.parametrize("size, multiple", [((5, 7), 4), ((8, 8), 4), ((1, 3), 8), ((2, 17), 16),
                                            ((9, 4), 1)])
@pytest.mark.parametrize("factor", [1, 3])
def test_edges_are_mirrored_as_numpys_reflect_does_and_cropped_again(size, multiple, factor):
    padding = Padding(size, multiple)
    images = torch.randn(2, 3, *(side * factor for side in size),
                         generator=torch.Generator().manual_seed(0))
    padded = padding.pad(images, factor)
    assert all(side % multiple == 0 for side in padding.padded)
    added = [(new - old) * factor for old, new in zip(size, padding.padded, strict=True)]
    before = [(new - old) // 2 * factor for old, new in zip(size, padding.padded, strict=True)]
    widths = [(0, 0), (0, 0), *((b, a - b) for a, b in zip(added, before, strict=True))]
    np.testing.assert_array_equal(padded, np.pad(images, widths, mode="reflect"))
    assert torch.equal(padding.crop(padded, factor), images)


def test_the_multiple_is_two_to_the_number_of_halvings():
    for mult in ([1], [1, 1], [1, 2, 2, 2]):
        net = build_network({"class_name": "EDMPrecond", "img_resolution": 16, "img_channels": 1,
                             "label_dim": 0, "model_type": "SongUNet", "model_channels": 4,
                             "num_blocks": 1, "channel_mult": mult})
        multiple = size_multiple(net)
        assert multiple == 2 ** (len(mult) - 1)
        assert net(torch.zeros(1, 1, 3 * multiple, 5 * multiple), 1.0).shape[2:] == (
            3 * multiple, 5 * multiple)
        assert size_multiple(TiledDenoiser(net, multiple)) == multiple
    assert size_multiple(lambda x, sigma: x) == 1


def pointwise(x, sigma, class_labels=None, condition=None):
    return x / (1 + sigma**2) + (0 if condition is None else 2 * condition)


@pytest.mark.parametrize("size", [(3, 30), (8, 8), (2, 9), (40, 3)])
def test_a_side_that_is_no_longer_than_a_tile_is_not_split(size):
    x = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(0))
    for tile in (4, 8, 12, 32):
        torch.testing.assert_close(TiledDenoiser(pointwise, tile)(x, 0.7), pointwise(x, 0.7))


def test_sizes_suit_the_guide_too():
    def net(levels):
        return build_network({"class_name": "EDMPrecond", "img_resolution": 16, "img_channels": 1,
                              "label_dim": 0, "model_type": "SongUNet", "model_channels": 4,
                              "num_blocks": 1, "channel_mult": [1] * levels})

    both = guided(net(2), guidance=2.0, gnet=net(3))
    assert size_multiple(both) == size_multiple(TiledDenoiser(both, 8)) == 4
    with pytest.raises(ValueError, match="tile=6: must be a multiple of 4"):
        TiledDenoiser(both, 6)


@pytest.mark.parametrize("tile", [8, 12, 40])
def test_tiles_of_a_pointwise_denoiser_give_what_the_whole_image_gives(tile):
    rng = torch.Generator().manual_seed(0)
    x, condition = (torch.randn(2, 1, 21, 30, generator=rng) for _ in range(2))
    found = TiledDenoiser(pointwise, tile)(x, torch.tensor(0.7), condition=condition)
    torch.testing.assert_close(found, pointwise(x, 0.7, condition=condition))


def test_no_network_sees_more_than_a_tile_and_the_tiles_cover_all_with_overlap():
    seen, starts = torch.zeros(37, 48), set()

    def net(x, sigma, class_labels=None):
        assert x.shape[2:] == (16, 16)
        rows, columns = x[0, 0, 0, 0].long() // 100, x[0, 0, 0, 0].long() % 100
        seen[rows:rows + 16, columns:columns + 16] += 1
        starts.add(int(columns))
        return x

    places = 100 * torch.arange(37.0)[:, None] + torch.arange(48.0)
    torch.testing.assert_close(TiledDenoiser(net, 16)(places[None, None], 1.0)[0, 0], places)
    assert seen.min() == 1
    starts = sorted(starts)
    assert starts[0] == 0 and starts[-1] == 32
    assert all(b - a <= 12 for a, b in zip(starts, starts[1:], strict=False))


def test_tiles_that_disagree_pass_into_one_another_without_a_seam():
    number = iter(range(1000))

    def net(x, sigma, class_labels=None):
        return torch.full_like(x, float(next(number) % 2))

    image = TiledDenoiser(net, 32)(torch.zeros(1, 1, 32, 100), 1.0)[0, 0]
    assert image.min() >= 0 and image.max() <= 1
    assert image.std() > 0.2  # they do disagree
    # A ramp from 0 to 1 over the overlap of 8 or more pixels: sin^2 rises by pi/16 a pixel.
    assert image.diff(dim=1).abs().max() <= math.pi / 16


@pytest.mark.parametrize("tile, nearest", [(0, 4), (6, 8), (17, 16)])
def test_a_tile_that_the_network_cannot_halve_is_refused(tile, nearest):
    net = build_network({"class_name": "EDMPrecond", "img_resolution": 16, "img_channels": 1,
                         "label_dim": 0, "model_type": "SongUNet", "model_channels": 4,
                         "num_blocks": 1, "channel_mult": [1, 1, 1]})
    with pytest.raises(ValueError, match=f"tile={tile}: must be a multiple of 4.*{nearest}$"):
        TiledDenoiser(net, tile)


@pytest.mark.parametrize("D", [2, 128, math.inf])
def test_a_crop_of_noise_is_noise_of_the_same_D(D):
    noise = PerturbationKernel(D).sample((4000, 1, 8, 8), 0.3, torch.Generator().manual_seed(1))
    crop = noise[:, :, 2:6, 1:4].double()
    N = crop[0].numel()
    ratio = crop.flatten(1).square().mean(dim=1) / 0.3**2
    law = scipy.stats.f(N, D) if math.isfinite(D) else scipy.stats.chi2(N, scale=1 / N)
    assert scipy.stats.kstest(ratio, law.cdf).pvalue > 0.01
