"""The two U-Nets: SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM).

    B batch    C channels    H W pixels    E embedding channels

DDPM++ and NCSN++ are from Song et al. 2021 (arXiv 2011.13456), ADM is from Dhariwal and Nichol 2021
(arXiv 2105.05233). Names of keywords and parameters are those of the published EDM and PFGM++
checkpoints. Parameters are float32; every layer runs in the dtype of its input.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

_SQRT_HALF = math.sqrt(0.5)  # keeps the variance of a sum of two branches
_SONG_ATTN_GAIN = math.sqrt(0.2)  # gain of the initial query, key and value projections
_ADM_HEAD_CHANNELS = 64

Init = Callable[[Sequence[int], int, int], torch.Tensor]  # (shape, fan_in, fan_out) -> weights


def _xavier_uniform(shape: Sequence[int], fan_in: int, fan_out: int) -> torch.Tensor:
    return math.sqrt(6 / (fan_in + fan_out)) * (2 * torch.rand(shape) - 1)


def _lecun_uniform(shape: Sequence[int], fan_in: int, fan_out: int) -> torch.Tensor:
    return math.sqrt(1 / fan_in) * (2 * torch.rand(shape) - 1)


def _standard_normal(shape: Sequence[int], fan_in: int, fan_out: int) -> torch.Tensor:
    return torch.randn(shape)


def _zeros(shape: Sequence[int], fan_in: int, fan_out: int) -> torch.Tensor:
    return torch.zeros(shape)


def _scaled(init: Init, gain: float) -> Init:
    return lambda shape, fan_in, fan_out: gain * init(shape, fan_in, fan_out)


_SONG_INIT_ZERO = _scaled(_xavier_uniform, 1e-5)  # for layers before a sum


class Linear(torch.nn.Module):
    """y = x W^T + b, in the dtype of x."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True,
        init: Init = _xavier_uniform, init_bias: Init = _zeros,
    ):
        super().__init__()
        fans = in_features, out_features
        self.weight = torch.nn.Parameter(init([out_features, in_features], *fans))
        self.bias = torch.nn.Parameter(init_bias([out_features], *fans)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Conv2d(torch.nn.Module):
    """Convolution with optional 2x up- or downsampling by a separable filter, in the dtype of x.

    `kernel=0` has no convolution, only the resampling. `fused_resample` pads the convolution so
    that the subsequent downsampling filter needs no padding.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, up: bool = False,
        down: bool = False, resample_filter: Sequence[float] = (1, 1),
        fused_resample: bool = False, init: Init = _xavier_uniform, init_bias: Init = _zeros,
    ):
        super().__init__()
        assert not (up and down) and not (fused_resample and not down)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.up, self.down, self.fused_resample = up, down, fused_resample
        self.weight = self.bias = None
        if kernel:
            fans = in_channels * kernel**2, out_channels * kernel**2
            shape = [out_channels, in_channels, kernel, kernel]
            self.weight = torch.nn.Parameter(init(shape, *fans))
            self.bias = torch.nn.Parameter(init_bias([out_channels], *fans))
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        taps = taps.outer(taps)[None, None] / taps.sum().square()
        self.register_buffer("resample_filter", taps if up or down else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.fused_resample:
            taps_pad = (self.resample_filter.shape[-1] - 1) // 2
            x = F.conv2d(x, self.weight.to(x.dtype),
                         padding=self.weight.shape[-1] // 2 + taps_pad)
            return self._downsample(x, padding=0) + bias[:, None, None]
        if self.up:
            x = self._upsample(x)
        if self.down:
            x = self._downsample(x, padding=(self.resample_filter.shape[-1] - 1) // 2)
        if self.weight is None:
            return x
        weight = self.weight.to(x.dtype)
        if weight.shape[-1] == 1:  # a matrix product in channels_last, without a copy
            return F.linear(x.movedim(1, 3), weight[:, :, 0, 0], bias).movedim(3, 1)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def _upsample(self, x: torch.Tensor) -> torch.Tensor:
        channels, size = x.shape[1], self.resample_filter.shape[-1]
        taps = (4 * self.resample_filter).to(x.dtype).expand(channels, 1, -1, -1)
        return F.conv_transpose2d(x, taps, stride=2, padding=(size - 1) // 2, groups=channels)

    def _downsample(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        taps = self.resample_filter.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, taps, stride=2, padding=padding, groups=x.shape[1])


class GroupNorm(torch.nn.GroupNorm):
    """Group normalisation with at most 32 groups of at least 4 channels, in the dtype of x."""

    def __init__(self, num_channels: int, eps: float):
        groups = min(max(num_channels // 4, 1), 32)
        if num_channels % groups:
            raise ValueError(f"{num_channels} channels can't be split into {groups} equal groups; "
                             "use a multiple of 32 (cbase, cres)")
        super().__init__(groups, num_channels, eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, shift = (p.to(x.dtype) for p in (self.weight, self.bias))
        return F.group_norm(x, self.num_groups, scale, shift, self.eps)


class UNetBlock(torch.nn.Module):
    """Residual block with the noise embedding added or scaled in, optional attention at its end.

        h = conv0(silu(norm0 x));  h = silu(norm1(h) modulated by emb);  x = skip(x) + conv1(h)

    Both U-Nets use this block with different keywords.
    """

    def __init__(
        self, in_channels: int, out_channels: int, emb_channels: int, *, up: bool = False,
        down: bool = False, attention: bool = False, num_heads: int = 1, dropout: float = 0.0,
        skip_scale: float = 1.0, eps: float = 1e-5, resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False, adaptive_scale: bool = True, init: Init = _lecun_uniform,
        init_bias: Init = _lecun_uniform, init_zero: Init = _zeros, init_attn: Init | None = None,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.num_heads = num_heads if attention else 0
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale
        plain = {"init": init, "init_bias": init_bias}
        zero = {"init": init_zero, "init_bias": _zeros}
        resample = {"up": up, "down": down, "resample_filter": resample_filter}
        emb_out = out_channels * (2 if adaptive_scale else 1)

        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **resample, **plain)
        self.affine = Linear(emb_channels, emb_out, **plain)
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, **zero)
        widens, resamples = in_channels != out_channels, up or down
        self.skip = None
        if widens or resamples:
            self.skip = Conv2d(in_channels, out_channels, int(widens or resample_proj),
                               **resample, **plain)
        if self.num_heads:
            attn = {"init": init_attn or init, "init_bias": init_bias}
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, **attn)
            self.proj = Conv2d(out_channels, out_channels, 1, **zero)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.conv0(silu(self.norm0(x)))
        h = self._modulate(h, self.affine(emb).to(x.dtype)[:, :, None, None])
        h = self.conv1(F.dropout(h, p=self.dropout, training=self.training))
        x = self.skip_scale * (h + (self.skip(x) if self.skip is not None else x))
        if self.num_heads:
            x = self.skip_scale * (x + self.proj(self._attend(self.norm2(x))))
        return x

    def _modulate(self, h: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Returns silu of norm1, modulated by the embedding [B, C or 2C, 1, 1]."""
        if not self.adaptive_scale:
            return silu(self.norm1(h + emb))
        scale, shift = emb.chunk(2, dim=1)
        return silu(torch.addcmul(shift, 1 + scale, self.norm1(h)))

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(x).permute(0, 2, 3, 1)  # pixels before channels, a view in channels_last
        qkv = qkv.reshape(B, H * W, self.num_heads, C // self.num_heads, 3)
        q, k, v = qkv.permute(4, 0, 2, 1, 3).contiguous()  # each [B, heads, H*W, C/heads]
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return out.reshape(B, H, W, C).permute(0, 3, 1, 2)


class PositionalEmbedding(torch.nn.Module):
    """[cos, sin] of the noise label at geometrically spaced frequencies from 1 to 1/10000."""

    def __init__(self, num_channels: int, *, endpoint: bool):
        super().__init__()
        self.num_channels, self.endpoint = num_channels, endpoint

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = self.num_channels // 2
        exponents = torch.arange(half, dtype=torch.float32, device=x.device)
        freqs = (1 / 10000) ** (exponents / (half - (1 if self.endpoint else 0)))
        angles = x.outer(freqs)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(torch.nn.Module):
    """[cos, sin] of the noise label at fixed random frequencies of standard deviation `scale`."""

    def __init__(self, num_channels: int, scale: float = 16.0):
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels // 2) * scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = x.outer(2 * torch.pi * self.freqs)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@dataclasses.dataclass(frozen=True)
class _Place:
    """The position of a block in a U-Net, and the shapes of its inputs and outputs."""

    name: str
    kind: str  # stem, down, block (encoder); in0, in1, up, block (decoder)
    size: tuple[int, int]  # height and width of the image there
    in_channels: int
    out_channels: int
    skip_channels: int = 0  # channels of the encoder output that is concatenated to the input
    closes: bool = False  # last block of its resolution

    @property
    def prefix(self) -> str:
        """The resolution as in the prefix of parameter names."""
        return _size_text(self.size)

    def attends(self, resolutions: Sequence[int]) -> bool:
        """Whether the longer side of the image is one of `resolutions`."""
        return max(self.size) in resolutions


def _encoder_places(
    sizes: Sequence[tuple[int, int]], widths: Sequence[int], num_blocks: int, in_channels: int,
    stem: int,
) -> list[_Place]:
    """Returns the encoder from the image down; the decoder also uses each output."""
    places, channels = [], in_channels
    for level, (size, width) in enumerate(zip(sizes, widths, strict=True)):
        kinds = [("down", "down") if level else ("conv", "stem")]
        kinds += [(f"block{i}", "block") for i in range(num_blocks)]
        for suffix, kind in kinds:
            out = {"stem": stem, "down": channels, "block": width}[kind]
            places.append(_Place(f"{_size_text(size)}_{suffix}", kind, size, channels, out))
            channels = out
    return places


def _decoder_places(
    sizes: Sequence[tuple[int, int]], widths: Sequence[int], num_blocks: int, skips: list[int]
) -> list[_Place]:
    """Returns the decoder from the lowest resolution up; `skips` are channels of the encoder."""
    places, channels, skips = [], skips[-1], list(skips)
    for size, width in zip(reversed(sizes), reversed(widths), strict=True):
        heads = ["in0", "in1"] if size == sizes[-1] else ["up"]
        for kind in heads:
            places.append(_Place(f"{_size_text(size)}_{kind}", kind, size, channels, channels))
        for i in range(num_blocks + 1):
            places.append(_Place(f"{_size_text(size)}_block{i}", "block", size, channels, width,
                                 skip_channels=skips.pop(), closes=i == num_blocks))
            channels = width
    return places


class _UNet(torch.nn.Module):
    """The forward pass that both U-Nets share: down through `enc`, up through `dec`.

    A subclass fills the two dicts in the order of the places. It defines the embedding, and what
    happens to the image in parallel to the main path.

    Attributes:
        num_halvings: how often the sides of the image are halved; images of any size that can be
            halved so often are accepted.
        checkpoint_blocks: store only the inputs of blocks for the backward pass, which computes
            each block a second time. The results are the same, including dropout. This is a
            setting of a run and not part of the network's configuration.
    """

    checkpoint_blocks = False

    @property
    def image_weights(self) -> list[str]:
        """Names of the weights [O, C, k, k] of the layers that read the input image directly."""
        return [f"enc.{self._encoder[0].name}.weight"]

    def __init__(self, img_resolution: int | Sequence[int], in_channels: int,
                 channel_mult: Sequence[int], model_channels: int, num_blocks: int, stem: int):
        super().__init__()
        height, width = image_size(img_resolution)
        _check_halvings((height, width), len(channel_mult) - 1)
        self.num_halvings = len(channel_mult) - 1
        widths = [model_channels * mult for mult in channel_mult]
        self._sizes = [(height >> level, width >> level) for level in range(len(widths))]
        self._encoder = _encoder_places(self._sizes, widths, num_blocks, in_channels, stem)
        self._decoder = _decoder_places(
            self._sizes, widths, num_blocks, [place.out_channels for place in self._encoder])

    def forward(
        self, x: torch.Tensor, noise_labels: torch.Tensor, class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns F(x), [B, out_channels, H, W]; noise_labels is c_noise, [B] or [1]."""
        emb = self._embed(noise_labels, class_labels, augment_labels)
        beside, skips = x, []
        for place in self._encoder:
            layer = self.enc[place.name]
            x = layer(x) if place.kind == "stem" else self._run_block(layer, x, emb)
            if place.kind == "down":
                x, beside = self._mix_input(place, x, beside)
            skips.append(x)
        image = None
        for place in self._decoder:
            if place.skip_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = self._run_block(self.dec[place.name], x, emb)
            if place.closes:
                image = self._mix_output(place, x, image)
        return image

    def _run_block(self, block: UNetBlock, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, x, emb, use_reentrant=False)
        return block(x, emb)

    def _embed(self, noise_labels, class_labels, augment_labels) -> torch.Tensor:
        """Returns the embedding of all labels, [B or 1, E] float32."""
        raise NotImplementedError

    def _mix_input(self, place: _Place, x: torch.Tensor, beside: torch.Tensor):
        """Returns (x, the image parallel to the encoder) after a downsampling block."""
        return x, beside

    def _mix_output(self, place: _Place, x: torch.Tensor, image: torch.Tensor | None):
        """Returns the output image after the last block of a resolution; None before the first."""
        raise NotImplementedError

    def _kept_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Returns the class labels; in training, label dropout sets some of them to zero."""
        if not (self.training and self.label_dropout):
            return labels
        kept = torch.rand([len(labels), 1], device=labels.device) >= self.label_dropout
        return labels * kept


class SongUNet(_UNet):
    """DDPM++ and NCSN++: skip connections scaled by sqrt(1/2), optional multi-resolution inputs.

    Args:
        img_resolution: image side, or [height, width].
        in_channels: channels of the input image.
        out_channels: channels of the output image.
        label_dim: class or condition labels, 0 = unconditional.
        augment_dim: augmentation labels, 0 = none.
        model_channels: channels at the highest resolution, before the multipliers.
        channel_mult: multiplier per resolution, from the highest down.
        channel_mult_emb: embedding channels over model_channels.
        num_blocks: residual blocks per resolution.
        attn_resolutions: image sides at which blocks attend; where the image is not square, its
            longer side counts.
        dropout: probability in every block.
        label_dropout: probability of training without the class label.
        embedding_type: 'positional' (DDPM++) or 'fourier' (NCSN++) noise embedding.
        channel_mult_noise: width of the noise embedding over model_channels.
        encoder_type: 'standard' (DDPM++), 'residual' (NCSN++) or 'skip'.
        decoder_type: 'standard' or 'skip'.
        resample_filter: [1, 1] (DDPM++) or [1, 3, 3, 1] (NCSN++).
    """

    def __init__(
        self, img_resolution: int | Sequence[int], in_channels: int, out_channels: int,
        label_dim: int = 0, augment_dim: int = 0, model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2), channel_mult_emb: int = 4,
        num_blocks: int = 4, attn_resolutions: Sequence[int] = (16,), dropout: float = 0.10,
        label_dropout: float = 0.0, embedding_type: str = "positional",
        channel_mult_noise: int = 1, encoder_type: str = "standard",
        decoder_type: str = "standard", resample_filter: Sequence[float] = (1, 1),
    ):
        check_choice("embedding_type", embedding_type, ["positional", "fourier"])
        check_choice("encoder_type", encoder_type, ["standard", "skip", "residual"])
        check_choice("decoder_type", decoder_type, ["standard", "skip"])
        super().__init__(img_resolution, in_channels, channel_mult, model_channels, num_blocks,
                         stem=model_channels)
        self.label_dropout = label_dropout
        self.encoder_type, self.decoder_type = encoder_type, decoder_type
        self._resample = {"resample_filter": resample_filter}
        emb_channels = model_channels * channel_mult_emb
        self._build_embedding(embedding_type, model_channels * channel_mult_noise, emb_channels,
                              label_dim, augment_dim)
        block = {
            "emb_channels": emb_channels, "num_heads": 1, "dropout": dropout,
            "skip_scale": _SQRT_HALF, "eps": 1e-6, "resample_proj": True,
            "adaptive_scale": False, "init": _xavier_uniform, "init_bias": _zeros,
            "init_zero": _SONG_INIT_ZERO, "init_attn": _scaled(_xavier_uniform, _SONG_ATTN_GAIN),
            **self._resample,
        }
        self.enc = torch.nn.ModuleDict()
        beside = in_channels
        for place in self._encoder:
            attention = place.kind == "block" and place.attends(attn_resolutions)
            self.enc[place.name] = (
                Conv2d(place.in_channels, place.out_channels, 3) if place.kind == "stem" else
                UNetBlock(place.in_channels, place.out_channels, down=place.kind == "down",
                          attention=attention, **block))
            if place.kind == "down":
                beside = self._build_input(place, beside)
        self.dec = torch.nn.ModuleDict()
        for place in self._decoder:
            attention = place.kind == "in0" or (place.closes and place.attends(attn_resolutions))
            self.dec[place.name] = UNetBlock(
                place.in_channels + place.skip_channels, place.out_channels,
                up=place.kind == "up", attention=attention, **block)
            if place.closes and self._has_output(place):
                self._build_output(place, out_channels)

    def _build_embedding(self, embedding_type: str, noise_channels: int, emb_channels: int,
                         label_dim: int, augment_dim: int) -> None:
        self.map_noise = (
            FourierEmbedding(noise_channels) if embedding_type == "fourier"
            else PositionalEmbedding(noise_channels, endpoint=True)
        )
        self.map_label = Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = (
            Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        )
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

    def _embed(self, noise_labels, class_labels, augment_labels) -> torch.Tensor:
        cos, sin = self.map_noise(noise_labels).chunk(2, dim=1)
        emb = torch.cat([sin, cos], dim=1)  # the order of the published networks
        if self.map_label is not None:
            scale = math.sqrt(class_labels.shape[1])
            emb = emb + self.map_label(self._kept_labels(class_labels) * scale)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        for layer in (self.map_layer0, self.map_layer1):
            emb = silu(layer(emb))
        return emb

    def _build_input(self, place: _Place, channels: int) -> int:
        """Adds the layers that feed the image to the encoder; returns its channels."""
        width = place.out_channels
        if self.encoder_type == "skip":
            self.enc[f"{place.prefix}_aux_down"] = Conv2d(
                channels, channels, 0, down=True, **self._resample)
            self.enc[f"{place.prefix}_aux_skip"] = Conv2d(channels, width, 1)
        if self.encoder_type == "residual":
            self.enc[f"{place.prefix}_aux_residual"] = Conv2d(
                channels, width, 3, down=True, fused_resample=True, **self._resample)
            return width
        return channels

    @property
    def image_weights(self):
        lower = [place.prefix for place in self._encoder if place.kind == "down"]
        beside = {"skip": [f"enc.{prefix}_aux_skip.weight" for prefix in lower],
                  "residual": [f"enc.{prefix}_aux_residual.weight" for prefix in lower[:1]]}
        return super().image_weights + beside.get(self.encoder_type, [])

    def _mix_input(self, place: _Place, x: torch.Tensor, beside: torch.Tensor):
        if self.encoder_type == "skip":
            beside = self.enc[f"{place.prefix}_aux_down"](beside)
            x = x + self.enc[f"{place.prefix}_aux_skip"](beside)
        if self.encoder_type == "residual":
            x = beside = _SQRT_HALF * (x + self.enc[f"{place.prefix}_aux_residual"](beside))
        return x, beside

    def _has_output(self, place: _Place) -> bool:
        return self.decoder_type == "skip" or place.size == self._sizes[0]

    def _build_output(self, place: _Place, out_channels: int) -> None:
        """Adds the layers that turn the features of a resolution into an image."""
        if self.decoder_type == "skip" and place.size != self._sizes[-1]:
            self.dec[f"{place.prefix}_aux_up"] = Conv2d(
                out_channels, out_channels, 0, up=True, **self._resample)
        self.dec[f"{place.prefix}_aux_norm"] = GroupNorm(place.out_channels, eps=1e-6)
        self.dec[f"{place.prefix}_aux_conv"] = Conv2d(
            place.out_channels, out_channels, 3, init=_SONG_INIT_ZERO)

    def _mix_output(self, place: _Place, x: torch.Tensor, image: torch.Tensor | None):
        if not self._has_output(place):
            return image
        own = silu(self.dec[f"{place.prefix}_aux_norm"](x))
        own = self.dec[f"{place.prefix}_aux_conv"](own)
        return own if image is None else own + self.dec[f"{place.prefix}_aux_up"](image)


class DhariwalUNet(_UNet):
    """ADM: the noise embedding scales and shifts every block; many attention heads.

    Args:
        img_resolution: image side, or [height, width].
        in_channels: channels of the input image.
        out_channels: channels of the output image.
        label_dim: class or condition labels, 0 = unconditional.
        augment_dim: augmentation labels, 0 = none.
        model_channels: channels at the highest resolution, before the multipliers.
        channel_mult: multiplier per resolution, from the highest down.
        channel_mult_emb: embedding channels over model_channels.
        num_blocks: residual blocks per resolution.
        attn_resolutions: image sides at which blocks attend; where the image is not square, its
            longer side counts.
        dropout: probability in every block.
        label_dropout: probability of training without the class label.
    """

    def __init__(
        self, img_resolution: int | Sequence[int], in_channels: int, out_channels: int,
        label_dim: int = 0, augment_dim: int = 0, model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4), channel_mult_emb: int = 4,
        num_blocks: int = 3, attn_resolutions: Sequence[int] = (32, 16, 8), dropout: float = 0.10,
        label_dropout: float = 0.0,
    ):
        super().__init__(img_resolution, in_channels, channel_mult, model_channels, num_blocks,
                         stem=model_channels * channel_mult[0])
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        plain = {"init": _lecun_uniform, "init_bias": _lecun_uniform}
        self.map_noise = PositionalEmbedding(model_channels, endpoint=False)
        self.map_augment = (
            Linear(augment_dim, model_channels, bias=False, init=_zeros) if augment_dim else None
        )
        self.map_layer0 = Linear(model_channels, emb_channels, **plain)
        self.map_layer1 = Linear(emb_channels, emb_channels, **plain)
        self.map_label = (
            Linear(label_dim, emb_channels, bias=False, init=_standard_normal)
            if label_dim else None
        )

        def block(place: _Place, **resample: bool) -> UNetBlock:
            attention = place.kind == "in0" or (
                place.kind == "block" and place.attends(attn_resolutions))
            return UNetBlock(
                place.in_channels + place.skip_channels, place.out_channels, emb_channels,
                dropout=dropout, attention=attention,
                num_heads=place.out_channels // _ADM_HEAD_CHANNELS, **resample)

        self.enc = torch.nn.ModuleDict({
            place.name: Conv2d(place.in_channels, place.out_channels, 3, **plain)
            if place.kind == "stem" else block(place, down=place.kind == "down")
            for place in self._encoder})
        self.dec = torch.nn.ModuleDict({
            place.name: block(place, up=place.kind == "up") for place in self._decoder})
        width = self._decoder[-1].out_channels
        self.out_norm = GroupNorm(width, eps=1e-5)
        self.out_conv = Conv2d(width, out_channels, 3, init=_zeros)

    def _embed(self, noise_labels, class_labels, augment_labels) -> torch.Tensor:
        first = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            first = first + self.map_augment(augment_labels)
        emb = self.map_layer1(silu(self.map_layer0(first)))
        if self.map_label is None:
            return silu(emb)
        return silu(emb + self.map_label(self._kept_labels(class_labels)))

    def _mix_output(self, place: _Place, x: torch.Tensor, image: torch.Tensor | None):
        if place.size != self._sizes[0]:
            return None
        return self.out_conv(silu(self.out_norm(x)))


def check_choice(name: str, value: str, allowed: list[str]) -> None:
    """Raises ValueError if `value` is not one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")


def image_size(img_resolution: int | Sequence[int]) -> tuple[int, int]:
    """Returns (height, width) of `img_resolution`, which is one side or [height, width].

    Raises:
        ValueError: it is neither.
    """
    single = isinstance(img_resolution, numbers.Integral)
    sides = [img_resolution, img_resolution] if single else list(img_resolution)
    if len(sides) != 2 or not all(isinstance(s, numbers.Integral) and s > 0 for s in sides):
        raise ValueError(f"img_resolution={img_resolution}: must be a positive whole number, or "
                         "[height, width]")
    return int(sides[0]), int(sides[1])


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _check_halvings(size: tuple[int, int], halvings: int) -> None:
    """Raises ValueError, naming the nearest sizes, if a side can't be halved `halvings` times."""
    factor = 2**halvings
    if not any(side % factor for side in size):
        return
    if size[0] == size[1]:
        given, nearest = f"{size[0]}", f"the nearest sizes are {_nearest(size[0], factor)}"
    else:
        given = f"{_size_text(size)} (height x width)"
        nearest = (f"the nearest height is {_nearest(size[0], factor)}, "
                   f"the nearest width {_nearest(size[1], factor)}")
    raise ValueError(f"image size {given} can't be halved {halvings} times; {nearest} "
                     "(or use fewer levels in channel_mult)")


def _nearest(side: int, factor: int) -> str:
    """Returns 'a or b', the multiples of `factor` around `side`; `side` itself if it is one."""
    below = side // factor * factor
    if below == side:
        return f"{side}"
    return f"{below} or {below + factor}" if below else f"{factor}"
