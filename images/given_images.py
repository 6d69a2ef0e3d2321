"""Images in memory, presented as the files of a data set so that its readers can read them.

| given | is read as |
|---|---|
| PIL.Image.Image | a picture, gray or RGB |
| array or tensor [H, W], [C, H, W] or [H, W, C] | a .npy of it, see images/array_files.py |
| array or tensor [n, C, H, W] or [n, H, W, C] | n of these |
"""

import io
import json
import os
import zlib
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import PIL.Image

from images import array_files
from images.image_files import ARRAY_SUFFIX, LABELS_NAME, picture_format


class GivenImages(os.PathLike):
    """Images in memory with file names, used in place of the path of a data set.

    Args:
        images: a stack of images, one picture, or a sequence of images that may differ in size.
        labels: class numbers [n] or vectors [n, label_dim]; None for no labels.
        scale: the scale of the images as `dataset.json` has it; None for the usual one.

    Raises:
        ValueError: these are not images, or the numbers of images and labels differ.
    """

    def __init__(self, images: Any, labels: Any = None, scale: dict[str, Any] | None = None):
        self._images = [_as_array(image, i) for i, image in enumerate(_as_list(images))]
        if not self._images:
            raise ValueError("no images are given; give at least one")
        self.names = [f"img{i:08d}{ARRAY_SUFFIX}" for i in range(len(self._images))]
        self._labels, self._scale = None, scale
        if labels is not None:
            self._labels = np.asarray(labels).tolist()
            if not isinstance(self._labels, list) or len(self._labels) != len(self._images):
                raise ValueError(f"{len(self._images)} images, but labels of shape "
                                 f"{list(np.shape(labels))}; give one label for each image")
        if labels is not None or scale is not None:
            self.names.append(LABELS_NAME)

    def __len__(self) -> int:
        return len(self._images)

    def open(self, name: str) -> IO[bytes]:
        """Returns the content of the file with this name, an image or dataset.json."""
        if name == LABELS_NAME:
            pairs = self._labels and list(zip(self.names, self._labels, strict=False))
            scale = {} if self._scale is None else {"scale": self._scale}
            return io.BytesIO(json.dumps({"labels": pairs, **scale}).encode())
        number = int(name.removeprefix("img").removesuffix(ARRAY_SUFFIX))
        return io.BytesIO(array_files.encode(self._images[number]))

    def stamp(self, name: str) -> str:
        """Returns a string that changes with the content: size and checksum."""
        data = self.open(name).getvalue()
        return f"{len(data)} {zlib.crc32(data)}"

    def close(self) -> None:
        """Does nothing, since no file is open."""

    def __fspath__(self) -> str:
        return "given images"  # the name in errors

    def __str__(self) -> str:
        return os.fspath(self)


def given_images(images: Any, labels: Any = None, scale: dict[str, Any] | None = None) -> Any:
    """Returns images in memory as a data set, or a path unchanged, since it has its own labels.

    Raises:
        ValueError: see `GivenImages`; or labels are given with a path.
    """
    if images is None or isinstance(images, GivenImages):
        return images
    if isinstance(images, (str, os.PathLike)):
        if labels is not None:
            raise ValueError(f"{images}: a data set has its labels in dataset.json; leave labels "
                             "out")
        return str(images)
    return GivenImages(images, labels, scale)


def as_numpy(values: Any) -> Any:
    """Returns a tensor on any device as an array (halves as float32), and other values as is."""
    if not hasattr(values, "detach"):
        return values
    values = values.detach().cpu()
    is_half = values.is_floating_point() and values.itemsize < 4
    return (values.float() if is_half else values).numpy()


def _as_list(images: Any) -> Sequence[Any]:
    if isinstance(images, PIL.Image.Image):
        return [images]
    images = as_numpy(images)
    if isinstance(images, np.ndarray):
        if images.ndim != 4:
            raise ValueError(f"images are an array of shape {list(images.shape)}; must be "
                             "[n, C, H, W] or a list of images; give one image as a list of one")
        return images
    if not isinstance(images, Sequence):
        raise ValueError(f"images are of type {type(images).__name__}; must be the path of a data "
                         "set, pictures, arrays or tensors")
    return images


def _as_array(image: Any, number: int) -> np.ndarray:
    """Returns one image as an array, whose shape and type are checked when it is read."""
    if isinstance(image, PIL.Image.Image):
        if not picture_format(image.mode, image.size).channels:
            raise ValueError(f"image {number} has mode {image.mode}; make it gray or RGB with "
                             "image.convert('L') or image.convert('RGB')")
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
    array = as_numpy(image)
    if not isinstance(array, np.ndarray):
        raise ValueError(f"image {number} is a {type(image).__name__}; images must be pictures, "
                         "arrays or tensors")
    return array
