r"""Non-leaking augmentation: random flips and one random warp, whose parameters the network knows.

    B batch    C H W image shape    p gate probability    w, tx, ty ~ Normal(0, 1)
    theta, r ~ U[-pi, pi)    q output position    x source position    t shift in pixels

This is the pipe of EDM (Karras et al. 2022, arXiv 2206.00364, appendix F.2), after StyleGAN2-ADA
(Karras et al. 2020, arXiv 2006.06676, appendix B). Each transform has a gate that opens with
probability p times its multiplier. The transforms act in this order, about the centre of the image:

    x-flip, y-flip   a fair coin each; exact mirroring of pixels
    scale            by s = 2^(0.2 w)
    rotation         by theta, counter-clockwise as displayed
    anisotropy       stretch by k = 2^(0.2 w) along the axis at angle r, by 1/k across it; r = 0
                     with probability 1/2
    translation      by t = 0.125 (W tx, H ty); +x is right, +y is down

All but the flips are one affine map q = A R s x + t, and the output at q is the source at

    x = 1/s R^-1 A^-1 (q - t).

Coordinates are in pixels, so images of any shape are rotated without distortion. W and H of the
translation are those of the image. All channels are transformed alike.

The source is extended beyond its edges by endless reflection. To resample it with little aliasing,
the image is upsampled 2x, read bilinearly, and downsampled 2x. Both filters are the sym6 wavelet
filter h. It is orthonormal, so the two passes undo each other where the map is the identity. Its
largest tap is h[5], so fine sample 2j lies at pixel j, and

    fine[n] = sqrt(2) sum_j h[n - 2j + 5] image[j]
    image[i] = 1/sqrt(2) sum_k h[k] fine[2i - 5 + k].

The reflected image has period 2(W-1) along x, so one period of fine samples holds all of it, and
coordinates are wrapped into that period. Even extreme maps never read outside. No size depends on
the draws, so the host never waits for the device.

The labels [B, 9] tell the network what was done; all zeros mean an unchanged image:

    x-flip, y-flip, w of scale, cos theta - 1, sin theta, w cos r, w sin r of anisotropy, tx, ty.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

LABEL_DIM = 9
_XFLIP_ALWAYS = 1e8  # EDM's multiplier: the gate is open at any p > 0, so only the coin decides

# Low-pass filter of the sym6 wavelet (Daubechies 1992, least asymmetric, 6 vanishing moments), as
# tabulated in PyWavelets: pywt.Wavelet("sym6").dec_lo. Sum sqrt(2), orthonormal to its even shifts.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
_PEAK = 5  # the largest tap, which lies within 0.1 of the filter's centroid


@dataclasses.dataclass(frozen=True)
class AugmentDraws:
    """The transform of each image, after the gates: [B] tensors, zero where a gate is closed.

    `draws[a:b]` are the draws of images a to b - 1; any index of a [B] tensor works.
    """

    xflip: torch.Tensor  # bool
    yflip: torch.Tensor  # bool
    scale: torch.Tensor  # w
    theta: torch.Tensor
    aniso: torch.Tensor  # w
    aniso_angle: torch.Tensor  # r; has no effect where w = 0
    tx: torch.Tensor
    ty: torch.Tensor

    def __getitem__(self, index) -> "AugmentDraws":
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return AugmentDraws(*(value[index] for value in values))

    @staticmethod
    def cat(parts: Sequence["AugmentDraws"]) -> "AugmentDraws":
        """Returns the concatenated draws of several batches."""
        return AugmentDraws(*(torch.cat([getattr(part, field.name) for part in parts])
                              for field in dataclasses.fields(AugmentDraws)))

    def labels(self) -> torch.Tensor:
        """Returns the augmentation labels, [B, 9] float32."""
        columns = [
            self.xflip, self.yflip, self.scale, self.theta.cos() - 1, self.theta.sin(),
            self.aniso * self.aniso_angle.cos(), self.aniso * self.aniso_angle.sin(),
            self.tx, self.ty,
        ]  # fmt: skip
        return torch.stack([column.to(torch.float32) for column in columns], dim=1)


@dataclasses.dataclass
class AugmentPipe:
    """Draws augmentations and applies them: `images, labels = pipe(images)`.

    Args:
        p: overall probability; an attribute that may change between calls.
        xflip, yflip, scale, rotate_frac, aniso, translate_frac: the gate of each transform opens
            with probability p times this multiplier; 0 switches it off. With no warp transform on,
            images are not resampled.
        scale_std: standard deviation of log2 s.
        rotate_frac_max: range of theta as a fraction of the full circle.
        aniso_std: standard deviation of log2 k.
        aniso_rotate_prob: probability that the stretched axis is at a random angle.
        translate_frac_std: standard deviation of the shift as a fraction of the image size.
    """

    p: float = 1.0
    _: dataclasses.KW_ONLY
    xflip: float = 0.0
    yflip: float = 0.0
    scale: float = 0.0
    rotate_frac: float = 0.0
    aniso: float = 0.0
    translate_frac: float = 0.0
    scale_std: float = 0.2
    rotate_frac_max: float = 1.0
    aniso_std: float = 0.2
    aniso_rotate_prob: float = 0.5
    translate_frac_std: float = 0.125

    @classmethod
    def standard(cls, p: float) -> "AugmentPipe":
        """Returns the pipe of EDM's training: half of all images x-flipped, the rest at rate p."""
        return cls(
            p, xflip=_XFLIP_ALWAYS, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1
        )

    def draw(
        self,
        batch: int,
        rng: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> AugmentDraws:
        """Returns random draws for `batch` images on the generator's device.

        Every variate is drawn even if its gate is closed, so the random stream does not depend on
        the settings, and no image depends on another.

        Args:
            batch: number of images; each rank draws for all images and takes its slice.
            rng: source of all randomness; None means the default generator of `device`.
            device: where to draw; used only without `rng`.
        """
        device = device if rng is None else rng.device
        uniform = torch.rand([11, batch], generator=rng, device=device)
        w_scale, w_aniso, tx, ty = torch.randn([4, batch], generator=rng, device=device)
        xflip, yflip, scale, rotate, aniso, translate = uniform[:6]  # gates
        xcoin, ycoin, frame, theta, angle = uniform[6:]
        theta = (theta * 2 - 1) * (math.pi * self.rotate_frac_max)
        angle = (angle * 2 - 1) * math.pi
        shifts = translate < self.p * self.translate_frac
        return AugmentDraws(
            xflip=(xflip < self.p * self.xflip) & (xcoin < 0.5),
            yflip=(yflip < self.p * self.yflip) & (ycoin < 0.5),
            scale=w_scale.where(scale < self.p * self.scale, 0),
            theta=theta.where(rotate < self.p * self.rotate_frac, 0),
            aniso=w_aniso.where(aniso < self.p * self.aniso, 0),
            aniso_angle=angle.where(frame < self.aniso_rotate_prob, 0),
            tx=tx.where(shifts, 0),
            ty=ty.where(shifts, 0),
        )

    def __call__(
        self,
        images: torch.Tensor,
        draws: AugmentDraws | None = None,
        *,
        rng: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the augmented images [B, C, H, W] and their labels [B, 9], both float32.

        Args:
            images: float32 [B, C, H, W], with any number of channels, square or not.
            draws: the transforms, on the images' device; None draws them.
            rng: source of the draws; None means the default generator of the images' device.
        """
        if draws is None:
            draws = self.draw(len(images), rng, images.device)
        images = torch.where(draws.xflip[:, None, None, None], images.flip(3), images)
        images = torch.where(draws.yflip[:, None, None, None], images.flip(2), images)
        if self.scale or self.rotate_frac or self.aniso or self.translate_frac:
            images = warp(images, *self._inverse_map(draws, *images.shape[2:]))
        return images, draws.labels()

    def _inverse_map(
        self, draws: AugmentDraws, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns L and b of x = L q + b in pixels: [B, 2, 2] and [B, 2], float64."""
        log_scale = draws.scale.double() * (math.log(2) * self.scale_std)
        log_stretch = draws.aniso.double() * (math.log(2) * self.aniso_std)
        unstretch = _stretch(draws.aniso_angle.double(), -log_stretch)
        linear = _rotation(-draws.theta.double()) @ unstretch / log_scale.exp()[:, None, None]
        shift = self.translate_frac_std * torch.stack([draws.tx * width, draws.ty * height], dim=1)
        return linear, -(linear @ shift.double()[:, :, None]).squeeze(2)


def warp(images: torch.Tensor, linear: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Returns images [B, C, H, W] whose value at q is the reflected source's at linear q + offset.

    The filters are matrix products and follow PyTorch's TF32 setting. Coordinates are always exact.

    Args:
        images: float32 [B, C, H, W].
        linear: [B, 2, 2], acting on (x, y) in pixels from the image's centre, y down.
        offset: [B, 2], in pixels.
    """
    height, width = images.shape[2:]
    device = images.device
    fine = _upsampler(height, device) @ (images @ _upsampler(width, device).T)
    grid = _sampling_grid(linear, offset, height, width)
    fine = F.grid_sample(fine, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return _downsampler(height, device) @ (fine @ _downsampler(width, device).T)


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    """Returns the counter-clockwise rotation (as displayed, y down) by `angle` [B], [B, 2, 2]."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, sin, -sin, cos], dim=1).unflatten(1, (2, 2))


def _stretch(angle: torch.Tensor, log_stretch: torch.Tensor) -> torch.Tensor:
    """Returns the stretch by exp(log_stretch) along the axis at `angle`, [B, 2, 2].

    With u the unit vector of the axis it is cosh(a) I + sinh(a) (2 u u^T - I), a = log_stretch.
    """
    mean, half = log_stretch.cosh(), log_stretch.sinh()
    cos, sin = half * (2 * angle).cos(), half * (2 * angle).sin()
    return torch.stack([mean + cos, -sin, -sin, mean - cos], dim=1).unflatten(1, (2, 2))


def _sampling_grid(
    linear: torch.Tensor, offset: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Returns where to read the upsampled period, for grid_sample: [B, 2H+10, 2W+10, 2] float32.

    Positions are in periods from the middle of the stored one, so wrapping subtracts the nearest
    integer.
    """
    qx, qy = (_fine_positions(size, linear.device) for size in (width, height))
    axes = []
    for axis, size in enumerate((width, height)):
        slope = (linear[:, axis] / _period(size)).float()[:, :, None, None]  # [B, 2, 1, 1]
        start = (offset[:, axis] / _period(size)).float()[:, None, None]
        periods = slope[:, 0] * qx + (slope[:, 1] * qy[:, None] + start)  # [B, 2H+10, 2W+10]
        axes.append(2 * (periods - periods.round()))
    return torch.stack(axes, dim=3)


def _fine_positions(size: int, device: torch.device) -> torch.Tensor:
    """Returns the fine samples that the downsampler reads, in pixels from the centre, [2*size+10].

    They are multiples of 1/2, exact in float32.
    """
    fine = torch.arange(_num_read(size), device=device, dtype=torch.float32) - _PEAK
    return (fine - (size - 1)) / 2


def _num_read(size: int) -> int:
    """Returns the number of fine samples that the downsampler reads along an axis."""
    return 2 * (size - 1) + len(SYM6)


def _period(size: int) -> int:
    """Returns the period, in pixels, of an axis continued by reflection about its end pixels."""
    return max(2 * (size - 1), 1)


@functools.lru_cache(maxsize=16)
def _upsampler(size: int, device: torch.device) -> torch.Tensor:
    """Returns the matrix [2*period+1, size] from an axis to one period of it upsampled 2x.

    The period is centred on the image. Its first fine sample is repeated as its last, so that
    bilinear reads need no wrapping. The matrix is built on the device, not copied from the host.
    """
    period = _period(size)
    fine = torch.arange(2 * period + 1, device=device)[:, None] - (size - 1)  # n
    pixel = torch.arange(size, device=device)  # j
    matrix = torch.zeros([2 * period + 1, size], dtype=torch.float64, device=device)
    for k, tap in enumerate(SYM6):
        twice_source = fine + _PEAK - k  # 2j of k = n - 2j + 5, before reflection
        source = twice_source.div(2, rounding_mode="floor") % period
        source = torch.minimum(source, period - source)
        matrix += math.sqrt(2) * tap * ((twice_source % 2 == 0) & (source == pixel))
    return matrix.float()


@functools.lru_cache(maxsize=16)
def _downsampler(size: int, device: torch.device) -> torch.Tensor:
    """Returns the matrix [size, 2*size+10] from fine samples to pixels."""
    fine = torch.arange(_num_read(size), device=device)
    pixel = torch.arange(size, device=device)[:, None]
    matrix = torch.zeros([size, len(fine)], dtype=torch.float64, device=device)
    for k, tap in enumerate(SYM6):
        matrix += tap / math.sqrt(2) * (fine == 2 * pixel + k)
    return matrix.float()
