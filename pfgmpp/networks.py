"""Denoisers: the four preconditioners that wrap a U-Net.

    B batch    C channels    H W pixels    sigma noise level    N = C*H*W    D augmented dimensions

A preconditioner turns a raw network F into a denoiser,

    D_theta(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma)),

so that inputs and targets of F have about unit variance (Karras et al. 2022, arXiv 2206.00364,
Table 1). A condition image, such as a low-resolution or masked copy of the target, is concatenated
to the noisy image: F([c_in x, condition]; c_noise). With `cond_c_in` the condition is scaled too,
F(c_in [x, condition]; c_noise), as in the forks of PFGM++ for CT images (Hein et al. 2023, arXiv
2312.09754).

Names of classes, keywords and parameters are those of the published EDM and PFGM++ checkpoints. F
runs in `compute_dtype`, everything around it in float32.
"""

import inspect
import math
from collections.abc import Sequence

import torch

from dnnlib.registry import Registry
from pfgmpp.few_steps import FewStep
from pfgmpp.kernel import PerturbationKernel, per_image
from pfgmpp.schedules import iddpm_levels, vp_sigma, vp_sigma_inv, vp_sigma_range
from pfgmpp.unets import DhariwalUNet, SongUNet, check_choice, image_size

MODELS: Registry[type[torch.nn.Module]] = Registry(
    "network", {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet})


class Precond(torch.nn.Module):
    """Base of the denoisers D_theta(x; sigma); a subclass gives the four coefficients.

    Args:
        img_resolution: image side, or [height, width].
        img_channels: image channels, any number. Vectors of N numbers are images of N channels
            and one pixel, for a model that takes those.
        label_dim: class or condition labels, 0 = unconditional.
        use_fp16: run F in float16 on CUDA.
        model_type: a name in `MODELS`: 'SongUNet' or 'DhariwalUNet'.
        pfgmpp: whether the network was trained on PFGM++ noise of `D` augmented dimensions.
        D: augmented dimensions; without `pfgmpp` it is ignored, and the attribute D is inf.
        cond_channels: channels of the condition image, 0 = none.
        cond_c_in: whether the condition is multiplied by c_in like x.
        few_step: the result of `FewStep.to_dict` for a network that samples in a few evaluations;
            None for a denoiser.
        **model_kwargs: keywords of the model.
    """

    default_model_type = "SongUNet"
    out_mult = 1  # the model has this many times the image's channels; the first part is used
    hyperparameters: tuple[str, ...] = ()  # the subclass's keywords, kept as attributes
    sigma_min: float
    sigma_max: float

    def __init__(
        self, img_resolution: int | Sequence[int], img_channels: int, label_dim: int = 0,
        use_fp16: bool = False, *, model_type: str | None = None, pfgmpp: bool = False,
        D: float = 128, cond_channels: int = 0, cond_c_in: bool = False,
        few_step: dict | None = None, **model_kwargs,
    ):
        super().__init__()
        model_type = model_type or self.default_model_type
        check_choice("model_type", model_type, list(MODELS))
        height, width = image_size(img_resolution)
        self.img_resolution = height if height == width else [height, width]
        self.img_channels, self.cond_channels = img_channels, cond_channels
        if cond_c_in and not cond_channels:
            raise ValueError("cond_c_in=True: the network has no condition; give cond_channels")
        self.cond_c_in = bool(cond_c_in)
        self.label_dim = label_dim
        self.few_step = None if few_step is None else FewStep.from_dict(few_step)
        self.pfgmpp = bool(pfgmpp)
        self.D = PerturbationKernel(D if pfgmpp else math.inf).D  # checks that D is in (0, inf]
        self.N = math.prod(self.image_shape)
        self.compute_dtype = torch.float16 if use_fp16 else torch.float32
        self.model_type, self.model_kwargs = model_type, model_kwargs
        self.model = MODELS[model_type](
            img_resolution=self.img_resolution, in_channels=img_channels + cond_channels,
            out_channels=img_channels * self.out_mult, label_dim=label_dim, **model_kwargs)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.img_channels, *image_size(self.img_resolution)

    @property
    def optional_hyperparameters(self) -> dict:
        """The subclass's keywords that are recorded only if they differ from their defaults."""
        return {}

    @property
    def use_fp16(self) -> bool:
        """Whether F runs in float16 (on CUDA)."""
        return self.compute_dtype == torch.float16

    @use_fp16.setter
    def use_fp16(self, value: bool) -> None:
        self.compute_dtype = torch.float16 if value else torch.float32

    @property
    def config(self) -> dict:
        """Class name and constructor keywords, as plain data for `build_network`."""
        return {
            "class_name": type(self).__name__, "img_resolution": self.img_resolution,
            "img_channels": self.img_channels, "label_dim": self.label_dim,
            "use_fp16": self.use_fp16, "model_type": self.model_type, "pfgmpp": self.pfgmpp,
            **({"D": self.D} if self.pfgmpp else {}),
            **({"cond_channels": self.cond_channels} if self.cond_channels else {}),
            **({"cond_c_in": True} if self.cond_c_in else {}),
            **({"few_step": self.few_step.to_dict()} if self.few_step else {}),
            **{name: getattr(self, name) for name in self.hyperparameters},
            **self.optional_hyperparameters, **self.model_kwargs,
        }

    def coefficients(self, sigma: torch.Tensor) -> tuple[torch.Tensor | float, ...]:
        """Returns (c_skip, c_out, c_in, c_noise) at sigma, a float32 tensor."""
        raise NotImplementedError

    def round_sigma(self, sigma: float | torch.Tensor) -> torch.Tensor:
        """Returns the nearest noise levels that the network knows, in sigma's dtype."""
        return torch.as_tensor(sigma)

    def forward(
        self, x: torch.Tensor, sigma: float | torch.Tensor,
        class_labels: torch.Tensor | None = None, force_fp32: bool = False,
        augment_labels: torch.Tensor | None = None, *, condition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the denoised images [B, C, H, W] float32.

        Args:
            x: noisy images [B, C, H, W]; vectors may also come as [B, N].
            sigma: noise level of any dtype, of shape [], [B] or [B, 1, 1, 1].
            class_labels: one-hot or real labels [B, label_dim]; None means zeros.
            force_fp32: run F in float32, regardless of `compute_dtype`.
            augment_labels: [B, augment_dim]; None means not augmented.
            condition: [B, cond_channels, H, W], in about [-1, 1], if the network needs one.

        Raises:
            ValueError: the condition is missing, not expected, or has another shape.
        """
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device)
        sigma = per_image(sigma, x.ndim)
        labels = None
        if self.label_dim:
            labels = x.new_zeros([1, self.label_dim]) if class_labels is None else (
                class_labels.to(torch.float32).reshape(-1, self.label_dim))
        dtype = torch.float32 if force_fp32 else self.compute_dtype
        if dtype == torch.float16 and x.device.type != "cuda":
            dtype = torch.float32  # half precision on the CPU is slower and has no benefit

        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        inner = self._with_condition(x, condition, c_in)
        layout = torch.channels_last if inner.ndim == 4 else torch.preserve_format
        inner = inner.to(dtype, memory_format=layout)
        raw = self.model(inner, c_noise.flatten(), labels, augment_labels=augment_labels)
        assert raw.dtype == dtype
        return c_skip * x + c_out * raw[:, :self.img_channels].to(torch.float32)

    def _with_condition(self, x: torch.Tensor, condition: torch.Tensor | None,
                        c_in: torch.Tensor | float) -> torch.Tensor:
        """Returns the input of F for x and the condition, after checking the condition."""
        if condition is None:
            if self.cond_channels:
                raise ValueError(f"condition=None: the network needs a condition image of "
                                 f"{self.cond_channels} channels; give condition=")
            return c_in * x
        expected = [len(x), self.cond_channels, *x.shape[2:]]
        if not self.cond_channels or list(condition.shape) != expected:
            allowed = f"must be {expected}" if self.cond_channels else "the network takes none"
            raise ValueError(f"condition of shape {list(condition.shape)}: {allowed}")
        condition = condition.to(torch.float32)
        return torch.cat([c_in * x, c_in * condition if self.cond_c_in else condition], dim=1)


class VPPrecond(Precond):
    """Variance-preserving SDE (Song et al. 2021): sigma(t)^2 = exp(beta_d t^2/2 + beta_min t) - 1.

    Args (beyond the base's): beta_d, beta_min: slope and start of the noise schedule. M: number of
    noise labels. epsilon_t: smallest time of training.
    """

    hyperparameters = ("beta_d", "beta_min", "M", "epsilon_t")

    def __init__(self, *args, beta_d: float = 19.9, beta_min: float = 0.1, M: int = 1000,
                 epsilon_t: float = 1e-5, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta_d, self.beta_min, self.M, self.epsilon_t = beta_d, beta_min, M, epsilon_t
        self.sigma_min, self.sigma_max = vp_sigma_range(epsilon_t, beta_d, beta_min)

    def sigma(self, t: float | torch.Tensor) -> torch.Tensor:
        """Returns the noise level of the schedule at time t."""
        return vp_sigma(torch.as_tensor(t), self.beta_d, self.beta_min)

    def sigma_inv(self, sigma: float | torch.Tensor) -> torch.Tensor:
        """Returns the time t at which the schedule reaches sigma."""
        return vp_sigma_inv(torch.as_tensor(sigma), self.beta_d, self.beta_min)

    def coefficients(self, sigma):
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * self.sigma_inv(sigma)


class VEPrecond(Precond):
    """Variance-exploding SDE (Song et al. 2021): the network predicts the noise over sigma.

    Args (beyond the base's): sigma_min, sigma_max: range of noise levels.
    """

    hyperparameters = ("sigma_min", "sigma_max")

    def __init__(self, *args, sigma_min: float = 0.02, sigma_max: float = 100.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def coefficients(self, sigma):
        return 1, sigma, 1, (sigma / 2).log()


class iDDPMPrecond(Precond):  # noqa: N801 - the name users know
    """Improved DDPM (Nichol and Dhariwal 2021): M discrete noise levels u_j of a cosine schedule.

        u_M = 0,  u_(j-1) = sqrt((u_j^2 + 1) / max(abar(j-1)/abar(j), C_1) - 1),
        abar(j) = sin^2(pi/2 * j / (M (C_2 + 1)))

    The model's second half of output channels, a variance in the original, is not used.

    Args (beyond the base's): C_1, C_2: clipping and offset of the schedule. M: number of levels.
    """

    default_model_type = "DhariwalUNet"
    out_mult = 2
    hyperparameters = ("C_1", "C_2", "M")

    def __init__(self, *args, C_1: float = 0.001, C_2: float = 0.008, M: int = 1000, **kwargs):
        super().__init__(*args, **kwargs)
        self.C_1, self.C_2, self.M = C_1, C_2, M
        levels = iddpm_levels(M, C_1, C_2, dtype=torch.float32)
        self.register_buffer("u", levels)
        self.sigma_min, self.sigma_max = float(levels[M - 1]), float(levels[0])

    def nearest_index(self, sigma: torch.Tensor) -> torch.Tensor:
        """Returns the indices of the nearest levels, int64 of sigma's shape."""
        flat = sigma.to(self.u.device, torch.float32).reshape(-1, 1)
        return (flat - self.u).abs().argmin(dim=1).reshape(sigma.shape)

    def round_sigma(self, sigma, return_index: bool = False):
        sigma = torch.as_tensor(sigma)
        index = self.nearest_index(sigma)
        return index if return_index else self.u[index].to(sigma.device, sigma.dtype)

    def coefficients(self, sigma):
        c_noise = self.M - 1 - self.nearest_index(sigma).to(torch.float32)
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise


class EDMPrecond(Precond):
    """EDM (Karras et al. 2022): unit variance of the network's input and target at every sigma.

    D_theta(x; 0) = x, as a consistency function requires. With a boundary b the same holds at
    sigma = b (Song et al. 2023, arXiv 2303.01469, appendix C):

        c_skip = sigma_data^2 / ((sigma - b)^2 + sigma_data^2)
        c_out = (sigma - b) sigma_data / sqrt(sigma^2 + sigma_data^2)

    Args (beyond the base's): sigma_min, sigma_max: range of noise levels. sigma_data: standard
    deviation of the data. boundary: b. boundary_in_training: whether b also holds in training mode.
    """

    default_model_type = "DhariwalUNet"
    hyperparameters = ("sigma_min", "sigma_max", "sigma_data")

    def __init__(self, *args, sigma_min: float = 0.0, sigma_max: float = math.inf,
                 sigma_data: float = 0.5, boundary: float = 0.0,
                 boundary_in_training: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.boundary, self.boundary_in_training = boundary, boundary_in_training

    @property
    def optional_hyperparameters(self):
        defaults = {"boundary": 0.0, "boundary_in_training": True}
        return {name: getattr(self, name) for name, default in defaults.items()
                if getattr(self, name) != default}

    def coefficients(self, sigma):
        has_boundary = self.boundary and (self.boundary_in_training or not self.training)
        above = sigma - self.boundary if has_boundary else sigma
        total = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / (above**2 + self.sigma_data**2)
        c_out = above * self.sigma_data / total.sqrt()
        return c_skip, c_out, 1 / total.sqrt(), sigma.log() / 4


PRECONDS: Registry[type[Precond]] = Registry("preconditioner", {
    "EDMPrecond": EDMPrecond, "VPPrecond": VPPrecond, "VEPrecond": VEPrecond,
    "iDDPMPrecond": iDDPMPrecond,
})


def known_levels(config: dict) -> tuple[float, float]:
    """Returns the lowest and the highest noise level that a network with a configuration knows.

    This does not work for iDDPM, whose levels are in its weights.
    """
    parameters = inspect.signature(PRECONDS[config["class_name"]]).parameters
    values = {name: config.get(name, parameter.default) for name, parameter in parameters.items()}
    if "beta_d" in values:
        return vp_sigma_range(values["epsilon_t"], values["beta_d"], values["beta_min"])
    if not {"sigma_min", "sigma_max"} <= values.keys():
        raise ValueError(f"network class {config['class_name']}: its constructor must name "
                         "sigma_min and sigma_max, the levels that it knows")
    return values["sigma_min"], values["sigma_max"]


def network_D(config: dict) -> float:
    """Returns the number of augmented dimensions in a network's configuration."""
    return float(config.get("D", 128)) if config.get("pfgmpp") else math.inf


def build_network(config: dict) -> Precond:
    """Returns a freshly initialised network from what `Precond.config` returned.

    Raises:
        ValueError: a class, model or keyword is unknown.
    """
    kwargs = dict(config)
    name = kwargs.pop("class_name", None)
    if name not in PRECONDS:
        raise ValueError(f"network class {name!r}: must be one of {', '.join(PRECONDS)}; if it "
                         "comes from a plugin, give --plugin=FILE")
    try:
        net = PRECONDS[name](**kwargs).to(memory_format=torch.channels_last)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None
    for parameter in net.parameters():
        if parameter.shape[2:] == (1, 1):  # used as a matrix, which sets its gradient's strides
            parameter.data = parameter.data.flatten(1)[:, :, None, None]
    return net
