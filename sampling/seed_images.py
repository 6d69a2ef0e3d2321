"""Images that sampling starts from or is conditioned on: seed k uses image k mod n of n.

The images may have any size. Each result has the size of its input.
"""

import functools
import os
from collections.abc import Sequence
from pathlib import PurePosixPath

import torch

from dnnlib.cli import flag_errors, shown_name
from images.dataset import ImageFolderDataset
from images.given_images import GivenImages
from images.image_files import composed
from images.scaling import Scaling
from torch_utils import distributed

_REMEDY = "name a data set, a folder or ZIP of images"
CONDITIONS_WORD = "cond"  # value of --init-image
_LOOKED_AT = 8  # images that are checked for their unit
_LARGEST, _LEAST_SPAN = 50.0, 0.01  # limits in the network's scale, usually -1 to 1


class UsageError(ValueError):
    """A flag that does not apply to this network, or that needs another flag."""


class SeedImages:
    """The images of a data set by seed: seed k has image k mod n of n, sorted by name.

    If the data set reads its condition images, those are used instead. `scaling` applies to the
    images that are used.
    """

    def __init__(self, dataset: ImageFolderDataset, scaling: Scaling):
        self._dataset, self._scaling = dataset, scaling

    @classmethod
    def of_conditions(cls, dataset: ImageFolderDataset) -> "SeedImages":
        """Returns the condition images of a data set that reads them."""
        return cls(dataset, dataset.cond_scaling)

    @classmethod
    def open(cls, flag: str, path: str | os.PathLike, channels: int, scaling: Scaling, *,
             size: tuple[int, int] | None = None, conditions: bool = False) -> "SeedImages":
        """Returns the images of a folder or ZIP.

        Args:
            flag: name of the flag, for errors.
            path: a folder or ZIP that `ImageFolderDataset` reads, or images in memory.
            channels: number of channels that the images must have.
            scaling: of the data that the network was trained on. The images must be in the same
                units, but for a network of 8-bit images, floats in memory are in -1 to 1.
            size: height and width that the images must have. None accepts any mix of sizes.
            conditions: use the data set's condition images, if it has any, instead of its images.

        Raises:
            OSError: the images can't be read.
            ValueError: it is no data set, or has another shape or number format.
        """
        with flag_errors(flag, path, _REMEDY):
            dataset = ImageFolderDataset(path, any_size=size is None)
            if conditions and dataset.has_conditions:
                dataset = ImageFolderDataset(path, use_conditions=True, any_size=size is None)
        given, own = (dataset.cond_shape, dataset.cond_scaling) if dataset.cond_shape else (
            dataset.image_shape, dataset.scaling)
        if given[0] != channels or (size is not None and tuple(given[1:]) != size):
            if size is None:
                given, allowed = f"of {given[0]} channel{'s' * (given[0] > 1)}", channels
            else:
                given = f"{'x'.join(map(str, given))} (channels x height x width)"
                allowed = "x".join(map(str, (channels, *size)))
            raise ValueError(f"{flag}={path}: images are {given}, but the network takes {allowed}; "
                             "convert them with dataset_tool.py")
        if isinstance(path, GivenImages) and scaling.is_8bit and dataset.dtype.kind == "f":
            scaling = own  # keeps the values unchanged: rounding would clip their noise
            _warn_of_no_negatives(f"{flag}={path}", dataset)
        elif own.is_8bit != scaling.is_8bit:
            given, allowed = ("8-bit" if s.is_8bit else "floating-point or 16-bit"
                              for s in (own, scaling))
            raise ValueError(f"{flag}={path}: images are {given}, but the network was trained on "
                             f"{allowed} images; give such images in the same units")
        images = cls(dataset, scaling)
        images.warn_of_unit(f"{flag}={path}")
        return images

    def warn_of_unit(self, where: str) -> None:
        """Warns of values that are far too large or too uniform for the network's data.

        A few images are checked. This reveals HU instead of 0 to 1, or the reverse.
        """
        if self._scaling.is_8bit:
            return
        step = max(len(self) // _LOOKED_AT, 1)
        looked_at = range(0, len(self), step)[:_LOOKED_AT]
        found = distributed.run_on_rank0(lambda: [
            (float(image.abs().max()), float(image.max() - image.min()))
            for image in (self([k]) for k in looked_at)])
        largest, span = (max(numbers) for numbers in zip(*found, strict=True))
        if largest <= _LARGEST and span >= _LEAST_SPAN:
            return
        center, spread = self._scaling.center[0], self._scaling.spread[0]
        what = f"reach {largest:.3g}" if largest > _LARGEST else f"span only {span:.2g}"
        distributed.warn0(
            f"{where}: values {what} in the network's scale, but its data range from about -1 to 1 "
            f"({center - spread:.6g} to {center + spread:.6g} in their own units); check the units "
            "of the images")

    def __call__(self, seeds: Sequence[int]) -> torch.Tensor:
        """Returns the images of `seeds`, [B, C, H, W] float32 in about [-1, 1]."""
        batch = self._dataset.get_batch([seed % len(self._dataset) for seed in seeds])
        images = batch[2] if self._dataset.cond_shape else batch[0]
        return self._scaling.to_network(torch.from_numpy(images))

    def __len__(self) -> int:
        return len(self._dataset)

    def names(self, seeds: Sequence[int]) -> tuple[str, ...]:
        """Returns the names of the images of `seeds`."""
        return tuple(self._dataset.all_names[seed % len(self)] for seed in seeds)

    @functools.cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """The height and width of each image. All ranks must access this.

        Raises:
            ValueError: an image can't be read, or its format differs from that of the first.
        """
        return distributed.run_on_rank0(lambda: self._dataset.sizes)

    @property
    def are_targets(self) -> bool:
        """Whether these are the images of a data set that also has condition images."""
        return self._dataset.has_conditions and not self._dataset.cond_shape

    @property
    def are_conditions(self) -> bool:
        """Whether these are the condition images of a data set that also has other images."""
        return self._dataset.cond_shape is not None

    @property
    def path(self) -> os.PathLike:
        """The folder or ZIP."""
        return self._dataset.path

    @property
    def fingerprint(self) -> str:
        """A sha256 of the files. All ranks must access this."""
        self._dataset.share_fingerprint()
        return self._dataset.fingerprint

    def stems(self) -> list[str]:
        """Returns the names of all images without their extensions.

        Raises:
            ValueError: two names differ only in their extensions.
        """
        names = self._dataset.all_names
        stems = [str(PurePosixPath(name).with_suffix("")) for name in names]
        first = dict(zip(reversed(stems), reversed(range(len(stems))), strict=True))
        for number, stem in enumerate(stems):
            if first[stem] != number:
                raise ValueError(
                    f"{self._dataset.path}: {shown_name(names[first[stem]])} and "
                    f"{shown_name(names[number])} differ only in their extension, so their results "
                    "would have the same name; rename one, or number the images with --seeds")
        return stems


def _warn_of_no_negatives(where: str, dataset: ImageFolderDataset) -> None:
    """Warns of images in 0 to 1, which many libraries use, instead of -1 to 1."""
    shown = [dataset.get_batch([k])[0] for k in range(min(len(dataset), _LOOKED_AT))]
    if all(image.min() >= 0 for image in shown) and max(image.max() for image in shown) <= 1:
        distributed.warn0(f"{where}: all values are between 0 and 1, but floating-point images "
                          "must range from -1 to 1; if 0 is black, give 2 * images - 1")


def check_pairs(inits: SeedImages | None, conditions: SeedImages | None, factor: int) -> None:
    """Checks that the images to start from match the condition images one by one.

    A single image matches all of the others. `factor` is the ratio of the result's sides to those
    of `inits`.

    Raises:
        UsageError: their numbers differ, only some of their names match, or their sizes differ.
    """
    if inits is None or conditions is None:
        return
    here, there = (list(map(composed, images.stems())) for images in (inits, conditions))
    if len(here) != len(there) and min(len(here), len(there)) > 1:
        raise UsageError(f"--init-image: has {len(here)} images, but --cond-image has "
                         f"{len(there)}; give equal numbers, or one image for all")
    if len(here) == len(there) and here != there and set(here) & set(there):
        other = next(a for a, b in zip(here, there, strict=True) if a != b)
        raise UsageError(f"--init-image: {shown_name(other)} has no image of the same name in "
                         "--cond-image, but others have; give equal names to the images of a pair, "
                         "or no equal names at all to pair them in sorted order")
    for k in range(max(len(here), len(there))):
        (height, width), other = inits.sizes[k % len(here)], conditions.sizes[k % len(there)]
        if (height * factor, width * factor) != other:
            raise UsageError(f"--init-image: the result of {shown_name(inits.names([k])[0])} would "
                             f"be {width * factor}x{height * factor}, but its condition image is "
                             f"{other[1]}x{other[0]}; give images of matching sizes")


def open_conditions(cond_channels: int, source: str, cond_image: str | None,
                    scaling: Scaling) -> SeedImages:
    """Returns the condition images for a network that needs them.

    Args:
        cond_channels: number of condition channels of the network.
        source: name of the network, for errors.
        cond_image: folder or ZIP of condition images.
        scaling: of the conditions that the network was trained on.

    Raises:
        ValueError: the images don't fit.
        UsageError: there are none.
    """
    if cond_image is None:
        raise UsageError(f"{source} needs condition images of {cond_channels} channels; give "
                         "--cond-image=DIR|ZIP")
    return SeedImages.open("--cond-image", cond_image, cond_channels, scaling, conditions=True)


def open_inits(channels: int, cond_channels: int, init_image: str | None, cond_image: str | None,
               scaling: Scaling) -> SeedImages | None:
    """Returns the images to start from. The word 'cond' means the condition images.

    If the network takes no conditions, 'cond' means those of the paired data set that --cond-image
    names, see `NetworkSampler.open`.

    Raises:
        ValueError: the images don't fit.
        UsageError: 'cond' is given without condition images.
    """
    if init_image is None:
        return None
    if init_image == CONDITIONS_WORD:
        if cond_image is None:
            raise UsageError("--init-image=cond: needs condition images; give a paired data set "
                             "with --cond-image=DIR|ZIP, or write ./cond for a folder named cond")
        return SeedImages.open("--init-image=cond, --cond-image", cond_image, channels, scaling,
                               conditions=True)
    images = SeedImages.open("--init-image", init_image, channels, scaling)
    if images.are_targets:
        way_out = " --cond-image=..." if not cond_channels else ""
        distributed.warn0(f"--init-image={init_image}: has condition images, but sampling starts "
                          "from its images, which are the targets of its pairs; give "
                          f"--init-image=cond{way_out} to start from the condition images")
    return images
