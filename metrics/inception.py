"""The Inception-v3 whose pooled features define FID: the TensorFlow graph of 2015-12-05.

    B batch    C channels    H W image size    features [B, 2048] = mean over the last 8x8 map

Szegedy et al. 2015 (arXiv 1512.00567) as Heusel et al. 2017 (arXiv 1706.08500) used it. Scores are
comparable only between programs that run exactly this graph, so its peculiarities are kept:

- images are resized to 299x299 as TensorFlow 1 did: bilinear, source position j*W/299 without the
  half-pixel shift, clamped at the border, no smoothing when shrinking; then scaled (x - 128)/128;
- average pools leave the padding out of the mean;
- the last block (Mixed_7c) pools by maximum where the others pool by mean.

The network is the table `NETWORK` below. Its names are those of the published weight file, which
are torchvision's. When the weights are loaded, batch norm is folded into the convolutions in
float64. Activations are kept channels-last.
"""

import hashlib
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.backends import cudnn

import dnnlib.util

WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_FILE}"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

FEATURE_DIM = 2048
RESOLUTION = 299
NUM_CLASSES = 1008
BN_EPS = 1e-3


@dataclass(frozen=True)
class Conv:
    """A convolution without bias, then batch norm and ReLU. `pad` is (vertical, horizontal)."""

    name: str
    channels: int
    kernel: tuple[int, int]
    stride: int = 1
    pad: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Fork:
    """Branches that read the same input; their outputs are concatenated over channels."""

    name: str
    branches: tuple["Steps", ...]


Pool = Callable[[torch.Tensor], torch.Tensor]
Steps = Sequence[Conv | Fork | Pool]
ApplyConv = Callable[[torch.Tensor, str, Conv], torch.Tensor]


def _halve(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, stride=2)


def _mean3x3(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max3x3(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _same(name: str, channels: int, height: int, width: int) -> Conv:
    return Conv(name, channels, (height, width), pad=(height // 2, width // 2))


def _valid(name: str, channels: int, size: int, stride: int) -> Conv:
    return Conv(name, channels, (size, size), stride)


def _mixed_35x35(name: str, pool_channels: int) -> Fork:
    return Fork(name, (
        [_same("branch1x1", 64, 1, 1)],
        [_same("branch5x5_1", 48, 1, 1), _same("branch5x5_2", 64, 5, 5)],
        [_same("branch3x3dbl_1", 64, 1, 1), _same("branch3x3dbl_2", 96, 3, 3),
         _same("branch3x3dbl_3", 96, 3, 3)],
        [_mean3x3, _same("branch_pool", pool_channels, 1, 1)],
    ))


def _mixed_17x17(name: str, inner: int) -> Fork:
    return Fork(name, (
        [_same("branch1x1", 192, 1, 1)],
        [_same("branch7x7_1", inner, 1, 1), _same("branch7x7_2", inner, 1, 7),
         _same("branch7x7_3", 192, 7, 1)],
        [_same("branch7x7dbl_1", inner, 1, 1), _same("branch7x7dbl_2", inner, 7, 1),
         _same("branch7x7dbl_3", inner, 1, 7), _same("branch7x7dbl_4", inner, 7, 1),
         _same("branch7x7dbl_5", 192, 1, 7)],
        [_mean3x3, _same("branch_pool", 192, 1, 1)],
    ))


def _mixed_8x8(name: str, pool: Pool) -> Fork:
    return Fork(name, (
        [_same("branch1x1", 320, 1, 1)],
        [_same("branch3x3_1", 384, 1, 1),
         Fork("", ([_same("branch3x3_2a", 384, 1, 3)], [_same("branch3x3_2b", 384, 3, 1)]))],
        [_same("branch3x3dbl_1", 448, 1, 1), _same("branch3x3dbl_2", 384, 3, 3),
         Fork("", ([_same("branch3x3dbl_3a", 384, 1, 3)], [_same("branch3x3dbl_3b", 384, 3, 1)]))],
        [pool, _same("branch_pool", 192, 1, 1)],
    ))


NETWORK: Steps = (
    _valid("Conv2d_1a_3x3", 32, 3, stride=2),
    _valid("Conv2d_2a_3x3", 32, 3, stride=1),
    _same("Conv2d_2b_3x3", 64, 3, 3),
    _halve,
    _valid("Conv2d_3b_1x1", 80, 1, stride=1),
    _valid("Conv2d_4a_3x3", 192, 3, stride=1),
    _halve,
    _mixed_35x35("Mixed_5b", pool_channels=32),
    _mixed_35x35("Mixed_5c", pool_channels=64),
    _mixed_35x35("Mixed_5d", pool_channels=64),
    Fork("Mixed_6a", (
        [_valid("branch3x3", 384, 3, stride=2)],
        [_same("branch3x3dbl_1", 64, 1, 1), _same("branch3x3dbl_2", 96, 3, 3),
         _valid("branch3x3dbl_3", 96, 3, stride=2)],
        [_halve],
    )),
    _mixed_17x17("Mixed_6b", inner=128),
    _mixed_17x17("Mixed_6c", inner=160),
    _mixed_17x17("Mixed_6d", inner=160),
    _mixed_17x17("Mixed_6e", inner=192),
    Fork("Mixed_7a", (
        [_same("branch3x3_1", 192, 1, 1), _valid("branch3x3_2", 320, 3, stride=2)],
        [_same("branch7x7x3_1", 192, 1, 1), _same("branch7x7x3_2", 192, 1, 7),
         _same("branch7x7x3_3", 192, 7, 1), _valid("branch7x7x3_4", 192, 3, stride=2)],
        [_halve],
    )),
    _mixed_8x8("Mixed_7b", _mean3x3),
    _mixed_8x8("Mixed_7c", _max3x3),
)


def run(steps: Steps, x: torch.Tensor, apply_conv: ApplyConv, prefix: str = "") -> torch.Tensor:
    """Returns the output of `steps` on `x` [B, C, H, W].

    `apply_conv(x, name, conv)` computes one convolution unit; `name` is its full name.
    """
    for step in steps:
        if isinstance(step, Conv):
            x = apply_conv(x, prefix + step.name, step)
        elif isinstance(step, Fork):
            inner = f"{prefix}{step.name}." if step.name else prefix
            x = torch.cat([run(branch, x, apply_conv, inner) for branch in step.branches], dim=1)
        else:
            x = step(x)
    return x


def conv_shapes() -> dict[str, tuple[int, int, int, int]]:
    """Returns the weight shape (out, in, height, width) of every convolution, by full name."""
    shapes = {}

    def record(x: torch.Tensor, name: str, conv: Conv) -> torch.Tensor:
        shapes[name] = (conv.channels, x.shape[1], *conv.kernel)
        size = [(s + 2 * p - k) // conv.stride + 1
                for s, p, k in zip(x.shape[2:], conv.pad, conv.kernel, strict=True)]
        return x.new_zeros([1, conv.channels, *size])

    run(NETWORK, torch.zeros(1, 3, 75, 75), record)  # the smallest possible input
    return shapes


def state_shapes() -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of the weight file, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in conv_shapes().items():
        shapes[f"{name}.conv.weight"] = shape
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{key}"] = shape[:1]
    return shapes | {"fc.weight": (NUM_CLASSES, FEATURE_DIM), "fc.bias": (NUM_CLASSES,)}


class InceptionV3:
    """The network with given weights: uint8 images in, features out.

    A plain callable instead of a module: nothing here is trained, saved or wrapped.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], device: torch.device | str = "cpu"):
        """Takes the content of the weight file, named and shaped as `state_shapes()`.

        Raises:
            ValueError: a tensor is missing, unknown, of another shape or not finite.
        """
        _check_state(state)
        self.device = torch.device(device)
        self._folded = {name: _fold(state, name, self.device) for name in conv_shapes()}
        self._class_weight = state["fc.weight"].to(self.device, torch.float64)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features [B, 2048] float32 of uint8 images [B, C, H, W], C = 1 or 3."""
        if len(images) == 0:
            return torch.empty([0, FEATURE_DIM], device=self.device)
        x = images.to(self.device).expand(-1, 3, -1, -1).to(torch.float32)
        x = ((resize(x, RESOLUTION) - 128) / 128).contiguous(memory_format=torch.channels_last)
        # TF32, cuDNN's default for convolutions, has only ten bits of mantissa.
        with cudnn.flags(enabled=True, benchmark=cudnn.benchmark,
                         deterministic=cudnn.deterministic, allow_tf32=False):
            return run(NETWORK, x, self._apply_conv).mean([2, 3])

    @torch.inference_mode()
    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Returns logits [B, 1008] float64 of features [B, 2048].

        The bias is left out, as in the code of the Inception score's authors.
        """
        return features.to(torch.float64) @ self._class_weight.T

    def _apply_conv(self, x: torch.Tensor, name: str, conv: Conv) -> torch.Tensor:
        weight, bias = self._folded[name]
        return F.conv2d(x, weight, bias, conv.stride, conv.pad).relu_()


def resize(x: torch.Tensor, size: int) -> torch.Tensor:
    """Returns `x` [B, C, H, W] resized to [B, C, size, size] as TensorFlow 1 does."""
    for dim in (2, 3):
        below, above, fraction = _taps(x.shape[dim], size, x.device)
        if dim == 2:
            fraction = fraction[:, None]
        x = torch.lerp(x.index_select(dim, below), x.index_select(dim, above), fraction)
    return x


def _taps(length: int, size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Returns the two source positions of each target position, and the weight of the second."""
    position = torch.arange(size, dtype=torch.float64, device=device) * length / size
    below = position.long()  # the floor, because positions are in [0, length)
    return below, (below + 1).clamp(max=length - 1), (position - below).to(torch.float32)


def _fold(state: Mapping[str, torch.Tensor], name: str,
          device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns weight and bias of a convolution that equals the convolution with batch norm."""
    weight = state[f"{name}.conv.weight"].double()
    gain, bias, mean, var = (state[f"{name}.bn.{key}"].double()
                             for key in ("weight", "bias", "running_mean", "running_var"))
    scale = gain / (var + BN_EPS).sqrt()
    folded = (weight * scale[:, None, None, None]).to(device, torch.float32)
    return (folded.contiguous(memory_format=torch.channels_last),
            (bias - mean * scale).to(device, torch.float32))


def _check_state(state: Mapping[str, torch.Tensor]) -> None:
    expected = state_shapes()
    # Some versions of PyTorch write a counter for each batch norm, which is not used.
    names = {name for name in state if not name.endswith(".num_batches_tracked")}
    if names != expected.keys():
        missing, unknown = sorted(expected.keys() - names), sorted(names - expected.keys())
        raise ValueError(f"not the Inception weights: {len(missing)} names missing {missing[:2]}, "
                         f"{len(unknown)} unknown {unknown[:2]}")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(f"not the Inception weights: {name} is "
                             f"{list(state[name].shape)}, expected {list(shape)}")
        if not state[name].isfinite().all():
            raise ValueError(f"Inception weights: {name} has values that are not finite")


def load_weights(path: str | None = None) -> dict[str, torch.Tensor]:
    """Returns the content of a weight file, without running any code in it.

    Without a `path` it is the published file, which is downloaded to the cache folder if needed.

    Raises:
        OSError: the file can't be read or downloaded.
        ValueError: it is not a weight file, or not the published one if `path` is None.
    """
    source, data = _read_weights(path)
    digest = hashlib.sha256(data).hexdigest()
    if path is None and digest != WEIGHTS_SHA256:
        raise ValueError(f"{source}: not {WEIGHTS_FILE} (sha256 {digest[:16]}..., expected "
                         f"{WEIGHTS_SHA256[:16]}...)")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{source}: {str(error).splitlines()[0]}") from error


def _read_weights(path: str | None) -> tuple[str, bytes]:
    by_hand = dnnlib.util.cache_dir(WEIGHTS_FILE)
    if path is None and by_hand.is_file():
        path = str(by_hand)
    if path is not None:
        with open(path, "rb") as file:
            return path, file.read()
    try:
        with dnnlib.util.open_url(WEIGHTS_URL, sha256=WEIGHTS_SHA256) as file:
            return file.name, file.read()
    except OSError as error:
        raise OSError(f"Inception weights: download {WEIGHTS_FILE} on another machine and put it "
                      f"at {by_hand}, or give a copy of it as the detector; the detector 'pixels' "
                      f"needs no weights ({error})") from error
