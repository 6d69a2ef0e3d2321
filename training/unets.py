"""The two U-Nets: SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM).

    B batch    C channels    H W pixels    E embedding channels

DDPM++ and NCSN++ are from Song et al. 2021 (arXiv 2011.13456), ADM is from Dhariwal and Nichol 2021
(arXiv 2105.05233). Names of keywords and parameters are those of the published EDM and PFGM++
checkpoints. Parameters are float32; every layer runs in the dtype of its input.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.nn.functional import silu

_SQRT_HALF = math.sqrt(0.5)  # keeps the variance of a sum of two branches
_SONG_ATTN_GAIN = math.sqrt(0.2)  # of the initial query, key and value projections
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
    that the downsampling filter after it needs no padding of its own.
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
        return F.conv2d(x, self.weight.to(x.dtype), bias, padding=self.weight.shape[-1] // 2)

    def _upsample(self, x: torch.Tensor) -> torch.Tensor:
        channels, size = x.shape[1], self.resample_filter.shape[-1]
        taps = (4 * self.resample_filter).to(x.dtype).expand(channels, 1, -1, -1)
        return F.conv_transpose2d(x, taps, stride=2, padding=(size - 1) // 2, groups=channels)

    def _downsample(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        taps = self.resample_filter.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, taps, stride=2, padding=padding, groups=x.shape[1])


class GroupNorm(torch.nn.Module):
    """Group normalisation with at most 32 groups of at least 4 channels."""

    def __init__(self, num_channels: int, eps: float):
        super().__init__()
        self.num_groups = max(min(32, num_channels // 4), 1)
        if num_channels % self.num_groups:
            raise ValueError(f"{num_channels} channels can't be split into {self.num_groups} equal "
                             f"groups; use a multiple of 32 (cbase, cres)")
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(num_channels))
        self.bias = torch.nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class UNetBlock(torch.nn.Module):
    """Residual block with the noise embedding added or scaled in, optional attention at its end.

        h = conv0(silu(norm0 x));  h = silu(norm1(h) modulated by emb);  x = skip(x) + conv1(h)

    The same block serves both U-Nets; what differs between them is in the keywords.
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
        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = 1 if resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, **resample, **plain)
        if self.num_heads:
            attn = {"init": init_attn or init, "init_bias": init_bias}
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, **attn)
            self.proj = Conv2d(out_channels, out_channels, 1, **zero)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.conv0(silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None].to(x.dtype)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = silu(torch.addcmul(shift, scale + 1, self.norm1(h)))
        else:
            h = silu(self.norm1(h + params))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            x = (self.proj(self._attend(self.norm2(x))) + x) * self.skip_scale
        return x

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(x).permute(0, 2, 3, 1)  # pixels before channels: a view in channels_last
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


def _sin_first(emb: torch.Tensor) -> torch.Tensor:
    """Reorders [cos, sin] to [sin, cos], the order of the Song U-Nets."""
    cos, sin = emb.chunk(2, dim=1)
    return torch.cat([sin, cos], dim=1)


def _drop_labels(labels: torch.Tensor, p: float) -> torch.Tensor:
    """Zeroes each image's label vector with probability p."""
    keep = torch.rand([labels.shape[0], 1], device=labels.device) >= p
    return labels * keep.to(labels.dtype)



class SongUNet(torch.nn.Module):
    """DDPM++ and NCSN++: skip connections scaled by sqrt(1/2), optional multi-resolution inputs.

    Args:
        img_resolution: image side.
        in_channels: channels of the input image.
        out_channels: channels of the output image.
        label_dim: class or condition labels, 0 = unconditional.
        augment_dim: augmentation labels, 0 = none.
        model_channels: channels at the highest resolution, before the multipliers.
        channel_mult: multiplier per resolution, from the highest down.
        channel_mult_emb: embedding channels over model_channels.
        num_blocks: residual blocks per resolution.
        attn_resolutions: image sides at which blocks attend.
        dropout: probability in every block.
        label_dropout: probability of training without the class label.
        embedding_type: 'positional' (DDPM++) or 'fourier' (NCSN++) noise embedding.
        channel_mult_noise: width of the noise embedding over model_channels.
        encoder_type: 'standard' (DDPM++), 'residual' (NCSN++) or 'skip'.
        decoder_type: 'standard' or 'skip'.
        resample_filter: [1, 1] (DDPM++) or [1, 3, 3, 1] (NCSN++).
    """

    def __init__(
        self, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0,
        augment_dim: int = 0, model_channels: int = 128, channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4, num_blocks: int = 4, attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10, label_dropout: float = 0.0, embedding_type: str = "positional",
        channel_mult_noise: int = 1, encoder_type: str = "standard",
        decoder_type: str = "standard", resample_filter: Sequence[float] = (1, 1),
    ):
        super().__init__()
        check_choice("embedding_type", embedding_type, ["positional", "fourier"])
        check_choice("encoder_type", encoder_type, ["standard", "skip", "residual"])
        check_choice("decoder_type", decoder_type, ["standard", "skip"])
        _check_halvings(img_resolution, channel_mult)
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise

        self.map_noise = (
            PositionalEmbedding(noise_channels, endpoint=True) if embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = (
            Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        )
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        init_zero = _scaled(_xavier_uniform, 1e-5)
        block = {
            "emb_channels": emb_channels, "num_heads": 1, "dropout": dropout,
            "skip_scale": _SQRT_HALF, "eps": 1e-6, "resample_filter": resample_filter,
            "resample_proj": True, "adaptive_scale": False, "init": _xavier_uniform,
            "init_bias": _zeros, "init_zero": init_zero,
            "init_attn": _scaled(_xavier_uniform, _SONG_ATTN_GAIN),
        }
        resample = {"resample_filter": resample_filter}
        widths = [model_channels * mult for mult in channel_mult]
        sides = [img_resolution >> level for level in range(len(widths))]

        self.enc = torch.nn.ModuleDict()
        channels, aux_channels = model_channels, in_channels
        self.enc[f"{sides[0]}x{sides[0]}_conv"] = Conv2d(in_channels, channels, 3)
        skips = [channels]
        for level, (side, width) in enumerate(zip(sides, widths, strict=True)):
            name = f"{side}x{side}"
            if level:
                self.enc[f"{name}_down"] = UNetBlock(channels, channels, down=True, **block)
                skips.append(channels)
                if encoder_type == "skip":
                    self.enc[f"{name}_aux_down"] = Conv2d(
                        aux_channels, aux_channels, 0, down=True, **resample)
                    self.enc[f"{name}_aux_skip"] = Conv2d(aux_channels, channels, 1)
                if encoder_type == "residual":
                    self.enc[f"{name}_aux_residual"] = Conv2d(
                        aux_channels, channels, 3, down=True, fused_resample=True, **resample)
                    aux_channels = channels
            for i in range(num_blocks):
                self.enc[f"{name}_block{i}"] = UNetBlock(
                    channels, width, attention=side in attn_resolutions, **block)
                channels = width
                skips.append(channels)

        self.dec = torch.nn.ModuleDict()
        lowest = len(sides) - 1
        for level, (side, width) in reversed(list(enumerate(zip(sides, widths, strict=True)))):
            name = f"{side}x{side}"
            if level == lowest:
                self.dec[f"{name}_in0"] = UNetBlock(channels, channels, attention=True, **block)
                self.dec[f"{name}_in1"] = UNetBlock(channels, channels, **block)
            else:
                self.dec[f"{name}_up"] = UNetBlock(channels, channels, up=True, **block)
            for i in range(num_blocks + 1):
                attention = i == num_blocks and side in attn_resolutions
                self.dec[f"{name}_block{i}"] = UNetBlock(
                    channels + skips.pop(), width, attention=attention, **block)
                channels = width
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < lowest:
                    self.dec[f"{name}_aux_up"] = Conv2d(
                        out_channels, out_channels, 0, up=True, **resample)
                self.dec[f"{name}_aux_norm"] = GroupNorm(channels, eps=1e-6)
                self.dec[f"{name}_aux_conv"] = Conv2d(channels, out_channels, 3, init=init_zero)

    def forward(
        self, x: torch.Tensor, noise_labels: torch.Tensor, class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns F(x), [B, out_channels, H, W]; noise_labels is c_noise, [B] or [1]."""
        emb = self._embed(noise_labels, class_labels, augment_labels)
        x, skips = self._encode(x, emb)
        return self._decode(x, emb, skips)

    def _embed(self, noise_labels, class_labels, augment_labels) -> torch.Tensor:
        emb = _sin_first(self.map_noise(noise_labels))
        if self.map_label is not None:
            labels = class_labels
            if self.training and self.label_dropout:
                labels = _drop_labels(labels, self.label_dropout)
            emb = emb + self.map_label(labels * math.sqrt(labels.shape[1]))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return silu(self.map_layer1(silu(self.map_layer0(emb))))

    def _encode(self, x, emb) -> tuple[torch.Tensor, list[torch.Tensor]]:
        skips, aux = [], x
        for name, block in self.enc.items():
            if name.endswith("_aux_down"):
                aux = block(aux)
            elif name.endswith("_aux_skip"):
                x = skips[-1] = x + block(aux)
            elif name.endswith("_aux_residual"):
                x = skips[-1] = aux = (x + block(aux)) * _SQRT_HALF
            else:
                x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
                skips.append(x)
        return x, skips

    def _decode(self, x, emb, skips) -> torch.Tensor:
        aux = normed = None
        for name, block in self.dec.items():
            if name.endswith("_aux_up"):
                aux = block(aux)
            elif name.endswith("_aux_norm"):
                normed = block(x)
            elif name.endswith("_aux_conv"):
                image = block(silu(normed))
                aux = image if aux is None else image + aux
            else:
                if x.shape[1] != block.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = block(x, emb)
        return aux


class DhariwalUNet(torch.nn.Module):
    """ADM: the noise embedding scales and shifts every block; many attention heads.

    Args:
        img_resolution: image side.
        in_channels: channels of the input image.
        out_channels: channels of the output image.
        label_dim: class or condition labels, 0 = unconditional.
        augment_dim: augmentation labels, 0 = none.
        model_channels: channels at the highest resolution, before the multipliers.
        channel_mult: multiplier per resolution, from the highest down.
        channel_mult_emb: embedding channels over model_channels.
        num_blocks: residual blocks per resolution.
        attn_resolutions: image sides at which blocks attend.
        dropout: probability in every block.
        label_dropout: probability of training without the class label.
    """

    def __init__(
        self, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0,
        augment_dim: int = 0, model_channels: int = 192, channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4, num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8), dropout: float = 0.10,
        label_dropout: float = 0.0,
    ):
        super().__init__()
        _check_halvings(img_resolution, channel_mult)
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

        def block(in_channels: int, out_channels: int, *, attention: bool = False, **resample):
            return UNetBlock(
                in_channels, out_channels, emb_channels, dropout=dropout, attention=attention,
                num_heads=out_channels // _ADM_HEAD_CHANNELS, **resample)

        widths = [model_channels * mult for mult in channel_mult]
        sides = [img_resolution >> level for level in range(len(widths))]

        self.enc = torch.nn.ModuleDict()
        channels = widths[0]
        self.enc[f"{sides[0]}x{sides[0]}_conv"] = Conv2d(in_channels, channels, 3, **plain)
        skips = [channels]
        for level, (side, width) in enumerate(zip(sides, widths, strict=True)):
            name = f"{side}x{side}"
            if level:
                self.enc[f"{name}_down"] = block(channels, channels, down=True)
                skips.append(channels)
            for i in range(num_blocks):
                self.enc[f"{name}_block{i}"] = block(
                    channels, width, attention=side in attn_resolutions)
                channels = width
                skips.append(channels)

        self.dec = torch.nn.ModuleDict()
        for level, (side, width) in reversed(list(enumerate(zip(sides, widths, strict=True)))):
            name = f"{side}x{side}"
            if level == len(sides) - 1:
                self.dec[f"{name}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{name}_in1"] = block(channels, channels)
            else:
                self.dec[f"{name}_up"] = block(channels, channels, up=True)
            for i in range(num_blocks + 1):
                self.dec[f"{name}_block{i}"] = block(
                    channels + skips.pop(), width, attention=side in attn_resolutions)
                channels = width
        self.out_norm = GroupNorm(channels, eps=1e-5)
        self.out_conv = Conv2d(channels, out_channels, 3, init=_zeros)

    def forward(
        self, x: torch.Tensor, noise_labels: torch.Tensor, class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns F(x), [B, out_channels, H, W]; noise_labels is c_noise, [B] or [1]."""
        emb = self._embed(noise_labels, class_labels, augment_labels)
        skips = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        for block in self.dec.values():
            if x.shape[1] != block.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        return self.out_conv(silu(self.out_norm(x)))

    def _embed(self, noise_labels, class_labels, augment_labels) -> torch.Tensor:
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(silu(self.map_layer0(emb)))
        if self.map_label is not None:
            labels = class_labels
            if self.training and self.label_dropout:
                labels = _drop_labels(labels, self.label_dropout)
            emb = emb + self.map_label(labels)
        return silu(emb)


def check_choice(name: str, value: str, allowed: list[str]) -> None:
    """Raises ValueError where `value` is not one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")


def _check_halvings(img_resolution: int, channel_mult: Sequence[int]) -> None:
    factor = 2 ** (len(channel_mult) - 1)
    if img_resolution % factor:
        below = img_resolution // factor * factor
        sizes = f"{below} or {below + factor}" if below else f"{factor}"
        raise ValueError(
            f"image size {img_resolution} can't be halved {len(channel_mult) - 1} times; "
            f"the nearest sizes are {sizes} (or use fewer levels in channel_mult)"
        )

