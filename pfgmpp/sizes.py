"""Images of other sizes than the network was trained on: padding, and denoising in tiles.

    B batch    C channels    H W pixels    D augmented dimensions

A U-Net without position inputs is convolutional, so a network trained on patches works on images of
any size that it can halve. The noise also carries over: a crop of the kernel's noise
sigma sqrt(D/c) z, with one c for the whole image, is the kernel's noise of the same D, because a
part of a multivariate Student-t vector is Student-t with the same degrees of freedom. So a network
that was trained on patches at D can be used for whole images at the same D.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from pfgmpp.wrapping import Wrapper, evaluate


class Padding:
    """Pads images by reflection until each side is a multiple of a number.

    The edge itself is not repeated: abcd becomes cbabcdcb. The reflection is repeated if a side
    grows by more than its own length.
    """

    def __init__(self, size: Sequence[int], multiple: int):
        self.size = tuple(size)
        self.padded = tuple(-(-side // multiple) * multiple for side in size)
        self._before = [(new - old) // 2 for old, new in zip(self.size, self.padded, strict=True)]

    def pad(self, images: torch.Tensor, factor: int = 1) -> torch.Tensor:
        """Returns images [B, C, H, W] padded; `factor` scales all sizes."""
        if self.padded == self.size:
            return images
        rows, columns = (
            _mirrored(old * factor, new * factor, before * factor, images.device)
            for old, new, before in zip(self.size, self.padded, self._before, strict=True))
        return images[:, :, rows][:, :, :, columns]

    def crop(self, images: torch.Tensor, factor: int = 1) -> torch.Tensor:
        """Returns padded images without their padding; undoes `pad`."""
        top, left = (before * factor for before in self._before)
        height, width = (side * factor for side in self.size)
        return images[:, :, top:top + height, left:left + width]


def _mirrored(size: int, padded: int, before: int, device: torch.device) -> torch.Tensor:
    """Returns the row of an image that each row of the padded image repeats."""
    period = max(2 * (size - 1), 1)
    place = torch.arange(-before, padded - before, device=device) % period
    return torch.minimum(place, period - place) if size > 1 else torch.zeros_like(place)


def size_multiple(net: Any) -> int:
    """Returns the number of which both sides of an image must be multiples; 1 without halvings.

    `net` may also be a denoiser that wraps one or two networks, as in pfgmpp/guidance.py.
    """
    multiple = 1 << getattr(getattr(net, "model", None), "num_halvings", 0)
    gnet = getattr(net, "gnet", None)
    return multiple if gnet is None else max(multiple, size_multiple(gnet))


class TiledDenoiser(Wrapper):
    """A denoiser that evaluates its network on one tile of the images at a time, to save memory.

    Tiles are squares of side `tile`, or smaller if the image is smaller. They are evenly spaced and
    overlap by at least a quarter of their side. They are averaged with sin^2 weights that fall to
    nearly 0 at their edges, so that there are no visible seams. The attributes are the network's.

    Raises:
        ValueError: the network can't halve a tile of this size.
    """

    def __init__(self, net: Any, tile: int):
        multiple = size_multiple(net)
        if tile < 1 or tile % multiple:
            nearest = max(round(tile / multiple), 1) * multiple
            raise ValueError(f"tile={tile}: must be a multiple of {multiple}, so that the network "
                             f"can halve it; the nearest is {nearest}")
        super().__init__(net)
        self.tile = tile

    def __call__(
        self, x: torch.Tensor, sigma: float | torch.Tensor,
        class_labels: torch.Tensor | None = None, *, condition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the denoised images [B, C, H, W] float32; arguments as for networks."""
        height, width = x.shape[2:]
        if max(height, width) <= self.tile:
            return evaluate(self.net, x, sigma, class_labels, condition)
        total = torch.zeros_like(x, dtype=torch.float32)
        weights = total.new_zeros([height, width])
        for rows in self._slices(height):
            for columns in self._slices(width):
                part = (..., rows, columns)
                weight = _window(rows, self.tile, x.device)[:, None] * _window(
                    columns, self.tile, x.device)
                denoised = evaluate(self.net, x[part], sigma, class_labels,
                                    None if condition is None else condition[part])
                total[part] += weight * denoised
                weights[rows, columns] += weight
        return total / weights

    def _slices(self, side: int) -> list[slice]:
        """Returns the ranges of the tiles along a side."""
        tile = self.tile
        if side <= tile:
            return [slice(0, side)]
        count = 1 + math.ceil((side - tile) / (tile - _overlap(tile)))
        starts = [round(i * (side - tile) / (count - 1)) for i in range(count)]
        return [slice(start, start + tile) for start in starts]


def _overlap(tile: int) -> int:
    return tile // 4


def _window(place: slice, tile: int, device: torch.device) -> torch.Tensor:
    """Returns the weights along one side of a tile, [its length] float32, all above 0."""
    side, overlap = place.stop - place.start, max(_overlap(tile), 1)
    inside = torch.arange(side, dtype=torch.float32, device=device) + 0.5
    edge = torch.minimum(inside, side - inside).clamp(max=overlap)
    return (math.pi / 2 * edge / overlap).sin().square()
