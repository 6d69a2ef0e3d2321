"""The class token of DINOv2, whose Frechet distance is called FD-DINOv2.

    B batch    C channels    H W image size    d width of the network    M side of the trained grid

Oquab et al. 2023 (arXiv 2304.07193), ViT-L/14, as Stein et al. 2023 (arXiv 2306.04675) and Karras
et al. 2024 (EDM2, arXiv 2312.02696) used it. The network itself comes from Hugging Face
transformers, an optional package. Scores are comparable only between programs that agree on the
rest, so these details are kept:

- images are resized to 224x224 by an antialiased bicubic filter with a = -0.5, in floating point,
  neither rounded nor clipped (as in EDM2; Stein et al. round to 8 bits), then scaled to
  (x/255 - mean)/deviation of ImageNet;
- the trained M x M position embedding is interpolated as the authors of DINOv2 do: a bicubic filter
  with a = -0.75 that reads position (i + 1/2) M/(16 + 0.1) - 1/2, where transformers reads
  (i + 1/2) M/16 - 1/2;
- the feature is the class token after the last layer norm.
"""

import contextlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.backends import cudnn

import dnnlib.util
from metrics.score_names import DINOV2

HUB_NAME = "facebook/dinov2-large"
HUB_REVISION = "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_SHA256 = "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23"
FETCH = f"hf download {HUB_NAME} {WEIGHTS_FILE} --revision {HUB_REVISION} --local-dir dinov2"
CONFIG_FILE = "config.json"
# The values in CONFIG_FILE of the published weights that are not transformers' defaults.
_CONFIG = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
           "image_size": 518, "patch_size": 14}
# Settings that change what a network computes; the others concern training or other uses.
_CONFIG_KEYS = (*_CONFIG, "mlp_ratio", "hidden_act", "layer_norm_eps", "num_channels", "qkv_bias",
                "use_swiglu_ffn", "use_mask_token")

RESOLUTION = 224
_OFFSET = 0.1  # interpolate_offset of the published model
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, red green blue
_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Weights:
    """A weight file with its hash and its configuration."""

    path: str
    sha256: str  # of the file
    config: Mapping[str, Any]  # its network, as arguments of transformers' Dinov2Config

    @property
    def name(self) -> str:
        """The name of a detector with these weights."""
        return DINOV2 if self.sha256 == WEIGHTS_SHA256 else f"{DINOV2}:{self.sha256[:16]}"


def require_package() -> None:
    """Raises OSError if transformers isn't installed."""
    if importlib.util.find_spec("transformers") is None:
        raise OSError(f"detector {DINOV2}: needs transformers: pip install transformers")


def check_place(place: str) -> None:
    """Raises ValueError if `place` is neither a folder nor a name on the hub."""
    if not os.path.isdir(place) and not _ON_HUB.fullmatch(place):
        raise ValueError(f"detector {DINOV2}:{place}: no such folder; must be a folder with "
                         f"{WEIGHTS_FILE} and {CONFIG_FILE}, or a name on the Hugging Face hub, "
                         f"such as {HUB_NAME}")


def find_weights(place: str | None = None) -> Weights:
    """Returns the weights in a folder, or those of a name on the hub, which are downloaded.

    Without a `place` they are the published ones. Those need no CONFIG_FILE in any folder.

    Raises:
        ValueError: there is no such folder or name, or the published file has another hash.
        OSError: a file can't be read or downloaded, or a package is missing.
    """
    require_package()
    if place in (None, HUB_NAME):
        path = _hub_file(HUB_NAME, WEIGHTS_FILE, HUB_REVISION, WEIGHTS_SHA256)
        digest = dnnlib.util.file_sha256(path)
        if digest != WEIGHTS_SHA256:
            raise ValueError(f"{path}: not the published {WEIGHTS_FILE} of {HUB_NAME} (sha256 "
                             f"{digest[:16]}..., expected {WEIGHTS_SHA256[:16]}...); remove it")
        return Weights(path, digest, _CONFIG)
    check_place(place)
    path = _file_of(place, WEIGHTS_FILE)
    digest = dnnlib.util.file_sha256(path)
    if digest == WEIGHTS_SHA256:
        return Weights(path, digest, _CONFIG)
    if os.path.isdir(place) and not os.path.isfile(os.path.join(place, CONFIG_FILE)):
        raise OSError(f"{path}: not the published file of {HUB_NAME} (sha256 {digest[:16]}..., "
                      f"expected {WEIGHTS_SHA256[:16]}...); if it should be, download it again; "
                      f"other weights need a {CONFIG_FILE} beside them, as save_pretrained() of "
                      "transformers writes it")
    return Weights(path, digest, _read_config(_file_of(place, CONFIG_FILE)))


def _file_of(place: str, name: str) -> str:
    if not os.path.isdir(place):
        return _hub_file(place, name)
    path = os.path.join(place, name)
    if not os.path.isfile(path):
        raise OSError(f"{place}: holds no {name}; put the published file of {HUB_NAME} here, or "
                      "write other weights with save_pretrained() of transformers (pickles, such "
                      "as pytorch_model.bin, are not read)")
    return path


def _hub_file(repository: str, name: str, revision: str | None = None,
              sha256: str | None = None) -> str:
    """Returns the path of a file of the hub: in the hub's cache, or downloaded to ours."""
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    cached = try_to_load_from_cache(repository, name, revision=revision)
    if isinstance(cached, str):
        return cached
    url = hf_hub_url(repository, name, revision=revision)
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError(f"{url}: not downloaded, because HF_HUB_OFFLINE is set")
        with dnnlib.util.open_url(url, sha256=sha256) as file:
            return file.name
    except OSError as error:
        if repository == HUB_NAME:
            advice = (f"DINOv2 weights: download {name} with '{FETCH}' on another machine, and "
                      f"give the folder as the detector {DINOV2}:FOLDER")
        else:
            advice = (f"detector {DINOV2}:{repository}: there is no such folder, and it can't be "
                      "read from the Hugging Face hub; give an existing folder with "
                      f"{WEIGHTS_FILE} and {CONFIG_FILE}")
        raise OSError(f"{advice} ({error})") from error


def _read_config(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind != "dinov2":
        raise ValueError(f"{path}: the model has type {kind!r}, but must have 'dinov2' (networks "
                         "with registers are another type)")
    return {key: found[key] for key in _CONFIG_KEYS if key in found}


class DinoV2:
    """The network with given weights: uint8 images in, class tokens out."""

    def __init__(self, weights: Weights, device: torch.device | str = "cpu"):
        """Reads the weight file, in float32.

        Raises:
            ValueError: it is damaged, or doesn't match its configuration.
        """
        self.device = torch.device(device)
        try:
            network = _build(weights.config, _load_state(weights.path))
            patch, width = network.embeddings.patch_embeddings.projection.kernel_size
            if patch != width or RESOLUTION % patch:
                raise ValueError(f"patches of {width}x{patch} pixels; must be square and divide "
                                 f"{RESOLUTION}")
            positions = position_embedding(network.embeddings.position_embeddings.detach(),
                                           RESOLUTION // patch)
        except ValueError as error:
            raise ValueError(f"{weights.path}: {error}") from error
        # The network uses an embedding of the size of the images without interpolating it.
        network.embeddings.position_embeddings = torch.nn.Parameter(positions)
        self._network = network.to(self.device).eval().requires_grad_(False)
        self.feature_dim: int = network.config.hidden_size
        self._mean, self._deviation = (torch.tensor(values, device=self.device)[:, None, None]
                                       for values in (_MEAN, _DEVIATION))  # [3, 1, 1]

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features [B, d] float32 of uint8 images [B, C, H, W], C = 1 or 3."""
        if len(images) == 0:
            return torch.empty([0, self.feature_dim], device=self.device)
        x = resize(images.to(self.device, torch.float32)).expand(-1, 3, -1, -1)
        with _without_tf32():
            found = self._network((x / 255 - self._mean) / self._deviation)
        return found.last_hidden_state[:, 0]


def resize(images: torch.Tensor) -> torch.Tensor:
    """Returns images [B, C, H, W] resized to RESOLUTION; values may overshoot."""
    return F.interpolate(images, size=(RESOLUTION, RESOLUTION), mode="bicubic", antialias=True)


def position_embedding(trained: torch.Tensor, side: int) -> torch.Tensor:
    """Returns the embedding [1, 1 + side^2, d] of a class token and side x side patches.

    `trained` is [1, 1 + M^2, d]. As in the published model, the scale factor is that of a side
    larger by 0.1, so that rounding never gives a result of another size.
    """
    grid_side = math.isqrt(trained.shape[1] - 1)
    if grid_side**2 != trained.shape[1] - 1:
        raise ValueError(f"positions of {trained.shape[1] - 1} patches, which do not form a square")
    if grid_side == side:
        return trained
    grid = trained[:, 1:].unflatten(1, (grid_side, grid_side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(side + _OFFSET) / grid_side, mode="bicubic")
    return torch.cat([trained[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def _load_state(path: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"not a complete safetensors file: {error}") from error
    if bad := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ValueError(f"{bad[0]} has values that are not finite")
    return state


def _build(config: Mapping[str, Any], state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Returns the network of a configuration with these weights, in float32.

    Some versions of transformers name its parts differently from files; from_pretrained maps them.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Dinov2Config, Dinov2Model
    try:
        with _quiet():
            network, found = Dinov2Model.from_pretrained(
                None, config=Dinov2Config(**config), state_dict=state, dtype=torch.float32,
                ignore_mismatched_sizes=True, output_loading_info=True)
    except (ValueError, TypeError, KeyError, ArithmeticError, RuntimeError,
            StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{CONFIG_FILE} does not describe a DINOv2: {reason}") from error
    if any(found[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")):
        counts = ", ".join(f"{len(found[f'{kind}_keys'])} {kind}"
                           for kind in ("missing", "unexpected", "mismatched"))
        raise ValueError(f"not the weights of the DINOv2 in {CONFIG_FILE}: tensors are {counts}")
    return network


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from printing a progress bar and a table of mismatched tensors."""
    from transformers.utils import logging
    before, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if had_bar:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Makes a GPU compute matrix products and convolutions in full float32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with cudnn.flags(enabled=True, benchmark=cudnn.benchmark,
                         deterministic=cudnn.deterministic, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before
