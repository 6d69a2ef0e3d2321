"""The images that sampling begins with or looks at: seed k has image k mod n of n.

They may be of any size. What is made of an image has its size.
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
CONDITIONS_WORD = "cond"  # as --init-image
_LOOKED_AT = 8  # images, for their unit
_LARGEST, _LEAST_SPAN = 50.0, 0.01  # of values as networks see them, usually from -1 to 1


class UsageError(ValueError):
    """A flag that this network has no use for, or that lacks another."""


class SeedImages:
    """The images of a data set by seed: seed k has image k mod n of its n, by sorted name.

    If the data set reads its condition images, these are meant instead. `scaling` is that of the
    images that are meant.
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
            flag: what errors call it.
            path: a folder or ZIP that `ImageFolderDataset` reads; or images in memory.
            channels: how many the images must have.
            scaling: of the data that the network was trained on, in whose units they must be.
                Floats in memory for a network of 8-bit images are in its own scale, -1 to 1.
            size: the height and width that they must have; None takes any, also different ones.
            conditions: use the data set's condition images, if it has any, instead of its images.

        Raises:
            OSError: it can't be read.
            ValueError: not a data set, or of another shape or kind of numbers.
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
            raise ValueError(f"{flag}={path}: images are {given}, the network takes {allowed}; "
                             "convert them with dataset_tool.py")
        if isinstance(path, GivenImages) and scaling.is_8bit and dataset.dtype.kind == "f":
            scaling = own  # which leaves them as they are: rounding would cut off their noise
            _warn_of_no_negatives(f"{flag}={path}", dataset)
        elif own.is_8bit != scaling.is_8bit:
            given, allowed = ("8-bit" if s.is_8bit else "floating-point or 16-bit"
                              for s in (own, scaling))
            raise ValueError(f"{flag}={path}: images are {given}, but the network was trained on "
                             f"{allowed}; give such images in the same units")
        images = cls(dataset, scaling)
        images.warn_of_unit(f"{flag}={path}")
        return images

    def warn_of_unit(self, where: str) -> None:
        """Warns of values that are far too large or too even for the network's data.

        A few images are looked at. HU where 0 to 1 is meant, or the other way round, shows.
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
            f"{where}: values {what} in the network's scale, where its data go from about -1 to 1 "
            f"({center - spread:.6g} to {center + spread:.6g} in their own unit); are they in "
            "another unit?")

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
        """The height and width of each image; every rank must ask for them.

        Raises:
            ValueError: an image can't be read, or is of another kind than the first.
        """
        return distributed.run_on_rank0(lambda: self._dataset.sizes)

    @property
    def are_targets(self) -> bool:
        """Whether these are the images of a data set that has condition images too."""
        return self._dataset.has_conditions and not self._dataset.cond_shape

    @property
    def are_conditions(self) -> bool:
        """Whether these are the condition images of a data set that has other images too."""
        return self._dataset.cond_shape is not None

    @property
    def path(self) -> os.PathLike:
        """The folder or ZIP."""
        return self._dataset.path

    @property
    def fingerprint(self) -> str:
        """A sha256 over the files; every rank must ask for it."""
        self._dataset.share_fingerprint()
        return self._dataset.fingerprint

    def stems(self) -> list[str]:
        """Returns the names of all images without their extensions.

        Raises:
            ValueError: two have the same.
        """
        names = self._dataset.all_names
        stems = [str(PurePosixPath(name).with_suffix("")) for name in names]
        first = dict(zip(reversed(stems), reversed(range(len(stems))), strict=True))
        for number, stem in enumerate(stems):
            if first[stem] != number:
                raise ValueError(
                    f"{self._dataset.path}: {shown_name(names[first[stem]])} and "
                    f"{shown_name(names[number])} have the same name but for the extension, and so "
                    "would what is made of them; rename one, or number the images by --seeds")
        return stems


def _warn_of_no_negatives(where: str, dataset: ImageFolderDataset) -> None:
    """Warns of images that go from 0 to 1, as many libraries have them, and not from -1 to 1."""
    shown = [dataset.get_batch([k])[0] for k in range(min(len(dataset), _LOOKED_AT))]
    if all(image.min() >= 0 for image in shown) and max(image.max() for image in shown) <= 1:
        distributed.warn0(f"{where}: all values are between 0 and 1, but floating-point images go "
                          "from -1 to 1 here; if 0 is black, give 2 * images - 1")


def check_pairs(inits: SeedImages | None, conditions: SeedImages | None, factor: int) -> None:
    """Checks that images to start from belong to the condition images, one by one.

    One image goes with all of the others. `factor` is what the sides of `inits` are multiplied by.

    Raises:
        UsageError: other numbers, names of which only some agree, or other sizes.
    """
    if inits is None or conditions is None:
        return
    here, there = (list(map(composed, images.stems())) for images in (inits, conditions))
    if len(here) != len(there) and min(len(here), len(there)) > 1:
        raise UsageError(f"--init-image: has {len(here)} images, --cond-image {len(there)}; give "
                         "as many, or one for all")
    if len(here) == len(there) and here != there and set(here) & set(there):
        other = next(a for a, b in zip(here, there, strict=True) if a != b)
        raise UsageError(f"--init-image: {shown_name(other)} has no partner of its name among "
                         "--cond-image, but others have; give pairs of equal names, or of names "
                         "that have nothing in common, which go by order")
    for k in range(max(len(here), len(there))):
        (height, width), other = inits.sizes[k % len(here)], conditions.sizes[k % len(there)]
        if (height * factor, width * factor) != other:
            raise UsageError(f"--init-image: {shown_name(inits.names([k])[0])} makes an image of "
                             f"{width * factor}x{height * factor}, but its condition image is "
                             f"{other[1]}x{other[0]}; they must be of one size")


def open_conditions(cond_channels: int, source: str, cond_image: str | None,
                    scaling: Scaling) -> SeedImages:
    """Returns the condition images of a network that takes some.

    Args:
        cond_channels: how many channels the network `source` takes.
        source: what errors call it.
        cond_image: the folder or ZIP that is given.
        scaling: of the conditions that the network was trained on.

    Raises:
        ValueError: images that don't fit; UsageError for none.
    """
    if cond_image is None:
        raise UsageError(f"{source} needs condition images of {cond_channels} channels; give "
                         "--cond-image=DIR|ZIP")
    return SeedImages.open("--cond-image", cond_image, cond_channels, scaling, conditions=True)


def open_inits(channels: int, cond_channels: int, init_image: str | None, cond_image: str | None,
               scaling: Scaling) -> SeedImages | None:
    """Returns the images to start from; 'cond' stands for the condition images.

    'cond' also names those of a paired data set that --cond-image names for a network without
    conditions, see `NetworkSampler.open`.

    Raises:
        ValueError: images that don't fit; UsageError for 'cond' without condition images.
    """
    if init_image is None:
        return None
    if init_image == CONDITIONS_WORD:
        if cond_image is None:
            raise UsageError("--init-image=cond: needs condition images; give a paired data set by "
                             "--cond-image=DIR|ZIP (a folder that is called cond is ./cond)")
        return SeedImages.open("--init-image=cond, --cond-image", cond_image, channels, scaling,
                               conditions=True)
    images = SeedImages.open("--init-image", init_image, channels, scaling)
    if images.are_targets:
        way_out = " --cond-image=..." if not cond_channels else ""
        distributed.warn0(f"--init-image={init_image}: has condition images, but sampling starts "
                          "from its images, which are the targets of its pairs; "
                          f"--init-image=cond{way_out} starts from the condition images")
    return images
