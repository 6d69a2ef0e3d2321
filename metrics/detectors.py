"""Feature extractors by name: images in, feature vectors out.

Images are uint8, or float32 in about [-1, 1] where the data are not 8-bit.

A detector also knows the name of a Frechet distance between its features. Only that of Inception is
called FID.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from dnnlib.registry import Registry
from dnnlib.util import file_sha256
from metrics import dinov2, inception
from metrics.classifier import Perceptron
from metrics.score_names import CLASSIFIER, DINOV2, INCEPTION, title

FEATURES_VERSION = 1  # raised when a detector's features change; part of the names of cached files
# A covariance of this many features takes 1.2 GB: 64x64 RGB images.
MAX_PIXEL_FEATURES = 3 * 64 * 64
_USUAL_PIXEL_FEATURES = 3 * 32 * 32  # a distance of so many features takes seconds
_POOLED = re.compile(r"pixels:([1-9]\d{0,5})")  # the pixels of downsampled images


def no_images(image_shape: Sequence[int], is_8bit: bool) -> torch.Tensor:
    """Returns an empty batch of images of this shape, to test whether a detector takes them."""
    return torch.empty([0, *image_shape], dtype=torch.uint8 if is_8bit else torch.float32)


class Detector:
    """A callable from images [B, C, H, W], uint8 or float32, to float features [B, feature_dim]."""

    name: str  # its name in statistics files
    distance_name: str  # the name of a Frechet distance between its features
    weights_sha256: str | None = None  # of the weight file, if there is one
    feature_dim: int | None = None  # length of a feature vector; None until the first batch sets it
    num_classes: int | None = None  # number of classes of the data, if it distinguishes them

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)  # where features are computed and returned

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the features; an empty batch is allowed and gives [0, feature_dim].

        Raises:
            ValueError: the detector does not take images of this kind or size.
        """
        raise NotImplementedError

    @classmethod
    def check_kind(cls, channels: int, is_8bit: bool) -> None:
        """Raises ValueError if the detector can't take images of this kind."""

    def dim_of(self, image_shape: Sequence[int], scale: dict[str, Any] | None) -> int:
        """Returns the length of the features of images of this shape.

        Args:
            image_shape: channels, height and width.
            scale: scale of the images; None if they are 8-bit.

        Raises:
            ValueError: the detector does not take such images.
        """
        return self(no_images(image_shape, scale is None)).shape[1]

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Returns unnormalised log probabilities of classes [B, classes] from features.

        Raises:
            ValueError: the detector has no classes.
        """
        self.check_classes()
        raise NotImplementedError

    @classmethod
    def check_classes(cls) -> None:
        """Raises ValueError if the detector has no classes, which the Inception score needs."""
        if cls.logits is Detector.logits:
            raise ValueError(f"detector {cls.name}: has no classes, which the Inception score "
                             "needs")

    @classmethod
    def check_recognises(cls) -> None:
        """Raises ValueError if the detector can't distinguish the classes of the data."""
        raise ValueError(f"detector {cls.name}: class accuracy needs a detector that was trained "
                         "on the classes of the data; give --detector=FILE.npz that 'fid.py "
                         "classifier' has written")


class _OfPhotographs(Detector):
    """A detector whose `_network` was trained on photographs: 8-bit images of 1 or 3 channels."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.check_kind(images.shape[1], images.dtype == torch.uint8)
        return self._network(images)

    @classmethod
    def check_kind(cls, channels: int, is_8bit: bool) -> None:
        if not is_8bit or channels not in (1, 3):
            kind = "8-bit" if is_8bit else "floating-point or 16-bit"
            raise ValueError(f"detector {cls.name}: takes 8-bit images of 1 or 3 channels, but "
                             f"these are {kind} of {channels}; use --detector=pixels (pixels:K "
                             "downsamples large ones by K), or 'fid.py pairs', which compares each "
                             "image with its truth")


class Inception(_OfPhotographs):
    """The 2048 pooled features of Inception-v3, which FID is defined by.

    They are computed with the published weights, unless `path` names a local file. Other weights of
    the same graph are allowed, but then the features and the distance have other names.
    """

    name = INCEPTION
    distance_name = title("fid", INCEPTION)
    feature_dim = inception.FEATURE_DIM

    def __init__(self, device: torch.device | str = "cpu", path: str | None = None):
        super().__init__(device)
        self.weights_sha256 = inception.WEIGHTS_SHA256
        if path is not None:
            self.name, self.distance_name = describe_detector(path)
            self.weights_sha256 = file_sha256(path)
        weights = inception.load_weights(path)
        try:
            self._network = inception.InceptionV3(weights, self.device)
        except ValueError as error:
            raise ValueError(f"{path or inception.WEIGHTS_FILE}: {error}") from error

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return self._network.logits(features)


class DinoV2(_OfPhotographs):
    """The class token of DINOv2, 1024 numbers, which FD-DINOv2 is defined by.

    The weights are those of `dinov2.find_weights(place)`. If they are not the published ones, the
    features and the distance have other names.
    """

    name = DINOV2
    distance_name = title("frechet_distance", DINOV2)

    def __init__(self, device: torch.device | str = "cpu", place: str | None = None):
        super().__init__(device)
        weights = dinov2.find_weights(place)
        self.name, self.weights_sha256 = weights.name, weights.sha256
        self.distance_name = title("frechet_distance", self.name)
        self._network = dinov2.DinoV2(weights, self.device)
        self.feature_dim = self._network.feature_dim


class Pixels(Detector):
    """The pixels themselves, flattened: x/127.5 - 1 of 8-bit images, else scaled as for networks.

    They give a plain distance between small images, which needs no download but says little about
    how the images look. With a `factor` the features are means over squares of `factor` pixels a
    side, and the factor is part of the name.
    """

    name = "pixels"
    distance_name = title("frechet_distance", "pixels")

    def __init__(self, device: torch.device | str = "cpu", factor: int = 1):
        super().__init__(device)
        self._factor = factor
        if factor > 1:
            self.name = f"pixels:{factor}"
            self.distance_name = title("frechet_distance", self.name)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        is_8bit, (channels, height, width) = images.dtype == torch.uint8, images.shape[1:]
        if height % self._factor or width % self._factor:
            raise ValueError(f"detector {self.name}: the sides of {width}x{height} images are not "
                             f"multiples of {self._factor}; give a factor of both")
        self.feature_dim = channels * height * width // self._factor**2
        if self.feature_dim > MAX_PIXEL_FEATURES:
            raise ValueError(f"detector {self.name}: {self.feature_dim} values per image, at most "
                             f"{MAX_PIXEL_FEATURES} (64x64 RGB); {_way_out(images.shape, is_8bit)}")
        features = _as_networks_see(images, self.device)
        if self._factor > 1 and len(features):
            features = torch.nn.functional.avg_pool2d(features, self._factor)
        return features.reshape(len(images), self.feature_dim)


class Classifier(Detector):
    """The last hidden layer of a classifier of small images, trained by 'fid.py classifier'.

    It takes only images with the shape and the scale of its training data.
    """

    name = CLASSIFIER
    distance_name = title("frechet_distance", CLASSIFIER)

    def __init__(self, device: torch.device | str, path: str):
        super().__init__(device)
        self._network = Perceptron.load(path).to(self.device)
        self.name, self.distance_name = describe_detector(path)
        self.weights_sha256 = file_sha256(path)
        self.feature_dim = self._network.feature_dim
        self.num_classes = self._network.num_classes

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        is_8bit, known = images.dtype == torch.uint8, self._network
        if tuple(images.shape[1:]) != known.image_shape or is_8bit != (known.scale is None):
            raise ValueError(f"detector {self.name}: was trained on "
                             f"{_shown(known.image_shape, known.scale is None)}, but these are "
                             f"{_shown(images.shape[1:], is_8bit)}; train one on such images with "
                             "'fid.py classifier'")
        return known.hidden(_as_networks_see(images, self.device).flatten(1))

    def dim_of(self, image_shape: Sequence[int], scale: dict[str, Any] | None) -> int:
        dim = super().dim_of(image_shape, scale)
        if scale != self._network.scale:
            raise ValueError(f"detector {self.name}: was trained on images of another scale; make "
                             "both data sets with the same --scale of dataset_tool.py")
        return dim

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return self._network.logits(features)

    @classmethod
    def check_recognises(cls) -> None:
        pass


def _as_networks_see(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns images [B, C, H, W], uint8 or float32, as float32 in about [-1, 1] on the device."""
    values = images.to(device, torch.float32)
    return values / 127.5 - 1 if images.dtype == torch.uint8 else values


def _shown(shape: Sequence[int], is_8bit: bool) -> str:
    channels, height, width = shape
    kind = "8-bit" if is_8bit else "floating-point or 16-bit"
    return f"{kind} {width}x{height} images of {channels} channel{'s' * (channels != 1)}"


def _way_out(shape: torch.Size, is_8bit: bool) -> str:
    """Returns advice on how images that have too many pixels can be scored."""
    _, channels, height, width = shape
    ways = ["--detector=inception"] if is_8bit and channels in (1, 3) else []
    factor = next((k for k in range(2, math.gcd(height, width) + 1)
                   if math.gcd(height, width) % k == 0
                   and channels * height * width <= _USUAL_PIXEL_FEATURES * k**2), None)
    if factor:
        ways.append(f"--detector=pixels:{factor}, the means of squares of {factor}x{factor} pixels")
    ways.append("'fid.py pairs', which compares each image with its truth")
    return f"use {', or '.join(ways)}"


DETECTORS: Registry[type[Detector]] = Registry("detector", {
    "inception": Inception,
    "dinov2": DinoV2,
    "pixels": Pixels,
})


def _names_of_plugin(spec: str) -> tuple[str, str] | None:
    """Returns (name, distance_name) of a plugin's detector, or None for other detectors.

    The names identify the plugin's file, because kept features and reference statistics are reused
    only by the detector of the same name.
    """
    digest = DETECTORS.origins.get(spec)
    if digest is None:
        return None
    name = f"{spec}:{digest[:16]}"
    return name, title("frechet_distance", name)


def detector_class(spec: str) -> type[Detector]:
    """Returns the class of the detector that `build_detector(spec)` makes.

    Raises:
        ValueError: `build_detector` does not take this `spec`.
    """
    if _POOLED.fullmatch(spec):
        return Pixels
    if place := _dinov2_place(spec):
        dinov2.check_place(place)
        return DinoV2
    if spec.endswith(".npz"):
        return Classifier
    if spec not in DETECTORS and not spec.endswith(".pth"):
        raise ValueError(f"detector {spec!r}: must be {', '.join(DETECTORS)}, dinov2:FOLDER or "
                         "dinov2:HUB_NAME with other weights, pixels:K with a whole number K, an "
                         f".npz of 'fid.py classifier', or a copy of {inception.WEIGHTS_FILE}")
    return DETECTORS.get(spec, Inception)


def _dinov2_place(spec: str) -> str:
    """Returns the folder or name in 'dinov2:PLACE'; '' for any other spec."""
    name, _, place = spec.partition(":")
    return place if name == DINOV2 else ""


def describe_detector(spec: str) -> tuple[str, str]:
    """Returns (name, distance_name) of the detector `build_detector(spec)`, without making it.

    DINOv2 weights that are named on the hub are downloaded.

    Raises:
        ValueError: `build_detector` does not take this `spec`.
        OSError: the weight file can't be read or downloaded.
    """
    kind = detector_class(spec)
    if names := _names_of_plugin(spec):
        return names
    if spec in DETECTORS:
        return kind.name, kind.distance_name
    if kind is Pixels:
        pooled = build_detector(spec)
        return pooled.name, pooled.distance_name
    if kind is DinoV2:
        name = dinov2.find_weights(_dinov2_place(spec)).name
        return name, title("frechet_distance", name)
    digest = file_sha256(spec)
    if kind is Classifier:
        name = f"{CLASSIFIER}:{digest[:16]}"
        return name, title("frechet_distance", name)
    if digest == inception.WEIGHTS_SHA256:
        return Inception.name, Inception.distance_name
    name = f"{INCEPTION}:{digest[:16]}"
    return name, title("frechet_distance", name)


def build_detector(spec: str, device: torch.device | str = "cpu") -> Detector:
    """Returns the detector called `spec`.

    `spec` is a name in `DETECTORS`; 'pixels:K' with the factor of `Pixels`; 'dinov2:PLACE' with a
    folder or a name on the Hugging Face hub; the path of a classifier (.npz); or the path of
    weights for Inception (.pth).

    Raises:
        ValueError: there is no such detector, or the file holds something other than its weights.
        OSError: the weights can't be read or downloaded, or a package is missing.
    """
    if pooled := _POOLED.fullmatch(spec):
        return Pixels(device, factor=int(pooled[1]))
    if place := _dinov2_place(spec):
        return DinoV2(device, place)
    if spec.endswith(".npz"):
        return Classifier(device, spec)
    detector = DETECTORS[spec](device) if spec in DETECTORS else Inception(device, path=spec)
    if names := _names_of_plugin(spec):
        detector.name, detector.distance_name = names
    return detector
