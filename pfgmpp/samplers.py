"""From a trained network and seeds to images.

    B batch    C channels    H W pixels    N = C*H*W    D augmented dimensions

Image k depends only on (network, seed k, sampler settings). Each seed has its own generator on the
sampling device, which draws in this order: the normal vector z [C, H, W]; the class, if there are
classes; the chi-square variate, if D is finite; then, at every step, the noise of churn or of
few-step networks if it is used, followed by a chi-square variate if D is finite. So one seed gives
the same class and direction at every D, and D = inf gives EDM's images.

Sampling may also begin at a given image y, at a level sigma below sigma_max. The state there is
y + sigma * latents, which is y with noise of the kernel, and the sampler continues from it (Meng et
al. 2021, SDEdit, arXiv 2108.01073, at D = inf). If y is itself noisy, `init_noise` = 0 makes y the
state. After each step the state x may be pulled back to y,

    x <- w x + (1 - w) y

(Hein et al. 2024, PPFM, arXiv 2312.09754, who call these hijacking and regularising).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from images.scaling import EIGHT_BIT
from pfgmpp.few_steps import FewStep, consistency
from pfgmpp.kernel import PerturbationKernel, per_image
from pfgmpp.networks import Precond
from pfgmpp.schedules import (
    DISCRETIZATIONS,
    SCALINGS,
    SCHEDULES,
    given_sigmas,
    make_schedule,
    sigma_grid,
)
from pfgmpp.sizes import Padding, size_multiple
from pfgmpp.solvers import (
    ADAMS_BASHFORTH,
    MULTISTEP,
    SOLVERS,
    Denoiser,
    RandnLike,
    blended,
    churn,
    disturbed,
    ending_in_euler,
    num_evaluations,
    schedule_slope,
    watched,
)
from pfgmpp.wrapping import evaluate
from torch_utils.misc import default_generator

Watch = Callable[[torch.Tensor, torch.Tensor], None]
PosteriorScale = Callable[[PerturbationKernel, torch.Tensor, torch.Tensor], torch.Tensor]
KernelScale = Callable[[PerturbationKernel], torch.Tensor]  # [B] float64
CONSISTENCY = "consistency"  # the solver of few-step networks, see pfgmpp/few_steps.py
ImagesOfSeeds = Callable[[Sequence[int]], torch.Tensor]  # [B, C, H, W] float32, about [-1, 1]
# Returns the denoiser of measured images, given the network and the measurements, and the images
# from which to start (None for pure noise).
Measure = Callable[[Precond, torch.Tensor], tuple[Callable, torch.Tensor | None]]
# Returns the labels [B, label_dim] float32 of seeds, given the classes [B] that they draw.
LabelsOfSeeds = Callable[[Sequence[int], torch.Tensor], torch.Tensor]
_SEED_RANGE = 1 << 32
_SHOWN_STD = 0.5  # about the standard deviation of images in [-1, 1]
_OF_INIT = {"init_noise": 1, "blend": 1}  # settings that need images to start from
_OF_STEPS = {"last": None, "stop_sigma": None, "blend": 1}  # settings for the equation in sigma
_OF_LOG_SIGMA = ("dpmpp2m", "unipc")  # solvers that divide by the distance of two levels
_FLOAT32_MAX = torch.finfo(torch.float32).max


class StackedRandomGenerator:
    """One generator per seed; row i of a drawn batch depends only on seed i."""

    def __init__(self, device: torch.device | str, seeds: Sequence[int]):
        self.generators = [torch.Generator(device) for _ in seeds]
        for rng, seed in zip(self.generators, seeds, strict=True):
            rng.manual_seed(int(seed) % _SEED_RANGE)

    def _stack(self, draw: Callable, size: Sequence[int], **kwargs) -> torch.Tensor:
        assert size[0] == len(self.generators), "one row per seed"
        return torch.stack([
            draw(size=list(size[1:]), generator=rng, **{"device": rng.device, **kwargs})
            for rng in self.generators])

    def randn(self, size: Sequence[int], **kwargs) -> torch.Tensor:
        """Returns standard normal variates of shape `size`, [B, ...]."""
        return self._stack(torch.randn, size, **kwargs)

    def rand(self, size: Sequence[int], **kwargs) -> torch.Tensor:
        """Returns variates of shape `size`, [B, ...], uniform in [0, 1)."""
        return self._stack(torch.rand, size, **kwargs)

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Returns standard normal variates of x's shape and dtype."""
        return self.randn(x.shape, dtype=x.dtype)

    def randint(self, *args: int, size: Sequence[int], **kwargs) -> torch.Tensor:
        """Returns integers of shape `size`, [B, ...]; other arguments as in torch.randint."""
        return self._stack(functools.partial(torch.randint, *args), size, **kwargs)

    def kernel_scale(self, kernel: PerturbationKernel) -> torch.Tensor:
        """Returns the kernel's radial factor sqrt(D/c), [B] float64."""
        return torch.cat([kernel.scale(1, rng) for rng in self.generators])

    def posterior_scale(
        self, kernel: PerturbationKernel, noise: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """Returns a draw of the radial factor given noise [B, ...] of level sigma, [B] float64."""
        return torch.cat([kernel.posterior_scale(row[None], sigma, rng)
                          for row, rng in zip(noise, self.generators, strict=True)])


def _posterior_scale(
    kernel: PerturbationKernel, noise: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """Returns `kernel.posterior_scale` from PyTorch's default generator."""
    return kernel.posterior_scale(noise, sigma, default_generator(noise.device))


def sampler(
    net: Callable, latents: torch.Tensor, class_labels: torch.Tensor | None = None,
    randn_like: RandnLike = torch.randn_like,
    num_steps: int = 18, sigma_min: float | None = None, sigma_max: float | None = None,
    rho: float = 7.0, S_churn: float = 0.0, S_min: float = 0.0, S_max: float = math.inf,
    S_noise: float = 1.0, solver: str = "heun", discretization: str = "edm",
    schedule: str = "linear", scaling: str = "none", *, order: int | None = None,
    sigmas: Sequence[float] | None = None, noise_alpha: float = 0.0,
    last: int | None = None, stop_sigma: float | None = None, init_noise: float = 1.0,
    blend: float = 1.0, watch: Watch | None = None,
    condition: torch.Tensor | None = None, init: torch.Tensor | None = None,
    posterior_scale: PosteriorScale = _posterior_scale, kernel_scale: KernelScale | None = None,
) -> torch.Tensor:
    """Returns samples [B, C, H, W] in float64; the default is Heun's method on the EDM grid.

    See Karras et al. 2022, Algorithms 1 and 2 and Table 1. It works at every D, because the state
    is s(t) times that of the equation in sigma.

    Args:
        net: a preconditioned network, or any denoiser (x, sigma, class_labels) with the attributes
            sigma_min, sigma_max, round_sigma and D. Without D, it is assumed to be inf.
        latents: unit-scale draws of the network's prior, [B, C, H, W].
        class_labels: [B, label_dim] or None.
        randn_like: source of the noise that churn adds.
        num_steps: number of noise levels above 0. Heun's method evaluates the network
            2*num_steps - 1 times, other solvers num_steps times. At finite D, every churned step
            takes one more evaluation.
        sigma_min: lowest noise level above 0; None means the discretisation's own, 0.002 for 'edm'.
        sigma_max: highest noise level; None means the discretisation's own, 80 for 'edm'.
        rho: how strongly low levels are favoured.
        S_churn: strength of the stochastic part; 0 is deterministic.
        S_min: lowest noise level that is churned.
        S_max: highest noise level that is churned.
        S_noise: factor on the noise that churn adds.
        solver: a name in `solvers.SOLVERS` or, without schedule, scaling, churn and noise_alpha, in
            `solvers.MULTISTEP`. 'consistency' is for few-step networks: their own levels, or
            `sigmas`, with fresh noise of the kernel between evaluations.
        discretization: grid of noise levels: 'vp', 've', 'iddpm' or 'edm'.
        schedule: how sigma depends on time: 'vp', 've' or 'linear'.
        scaling: how the state is scaled: 'vp' or 'none'.
        order: order of 'ipndm', 1 to 4; None means 3.
        sigmas: falling noise levels above 0, in place of a grid.
        noise_alpha: strength of noise added before each step, to test how robust the sampler is.
        last: number of steps to take at the end of the grid. The final one is first order and ends
            at the lowest level above 0.
        stop_sigma: level at which the final step ends; None means 0, or the lowest level above 0
            with `last`.
        init_noise: factor on the noise that is added to `init`; 0 starts at the images themselves.
        blend: w, the weight of the state after each step; `init` has the weight 1 - w.
        watch: called with (state, sigma) before each step.
        condition: [B, cond_channels, H, W], for networks with a condition image.
        init: images [B, C, H, W] to which noise of level sigma_max is added at the start; None
            means 0.
        posterior_scale: source of the factor of churn's noise at finite D, (kernel, n, sigma) ->
            [B].
        kernel_scale: source of the factor of the noise between evaluations of a few-step network,
            kernel -> [B]; None draws from PyTorch's default generator.

    Raises:
        ValueError: the settings can't be combined, or don't match the network.
    """
    config = SamplerConfig(num_steps, sigma_min, sigma_max, rho, S_churn, S_min, S_max, S_noise,
                           solver, discretization, schedule, scaling, noise_alpha, order, sigmas,
                           last, stop_sigma, init_noise, blend)
    config.check(net)
    if init is None:
        config.check_without_init()
    denoise = _float64_denoiser(net, class_labels, condition)
    grid = config.levels(net)
    back = None if blend == 1 else _blend(init, blend)
    if solver == CONSISTENCY:
        levels = grid.to(latents.device)
        noise_like = _kernel_noise(net, randn_like, kernel_scale)
        answer = denoise if back is None else lambda x, sigma: back(denoise(x, sigma))
        start = _start(latents, init_noise * levels[0], init)
        return consistency(answer, start, levels, noise_like, watch)
    # Without them the equation in sigma is solved directly, because a schedule's functions round.
    path = None if (schedule, scaling) == ("linear", "none") else make_schedule(
        schedule, scaling, *config.grid_range(net))
    times = grid if path is None else torch.cat([path.sigma_inv(grid[:-1]), grid.new_zeros(1)])
    times = times.to(latents.device)
    before_step = None
    if S_churn > 0:
        before_step = churn(times, randn_like, S_churn=S_churn, S_min=S_min, S_max=S_max,
                            S_noise=S_noise, round_sigma=net.round_sigma, schedule=path,
                            **_scaled_churn(net, denoise, posterior_scale))
    if noise_alpha > 0:
        before_step = disturbed(before_step, times, randn_like, noise_alpha=noise_alpha,
                                schedule=path)
    if watch and path:
        before_step = watched(before_step, times, lambda x, t: watch(x / path.scale(t),
                                                                     path.sigma(t)))
    elif watch:
        before_step = watched(before_step, times, watch)
    if back is not None:
        before_step = blended(before_step, times, back)
    first = times[0] if path is None else path.sigma(times[0])
    start = _start(latents, init_noise * first, init)
    if solver in MULTISTEP:
        options = {} if order is None else {"order": order}
        return MULTISTEP[solver](denoise, start, times, before_step, **options)
    if path is None:
        solve = ending_in_euler(SOLVERS[solver]) if grid[-1] > 0 else SOLVERS[solver]
        samples = solve(denoise, start, times, before_step)
        return samples if back is None else back(samples)
    return SOLVERS[solver](denoise, start * path.scale(times[0]), times, before_step,
                           schedule_slope(path))


# The function names of EDM and PFGM++. The first had EDM's levels as defaults, which its grid has.
edm_sampler = ablation_sampler = sampler


@torch.inference_mode()
def encode(
    net: Callable, images: torch.Tensor, class_labels: torch.Tensor | None = None, *,
    config: "SamplerConfig", condition: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the latents from which `sampler` makes these images, [B, C, H, W] float64.

    The equation is solved from the lowest level of the grid to the highest. The image is taken as
    the state at the lowest level. Sampling from the latents reproduces the images up to the error
    of the steps.

    Args:
        net: denoiser, as for `sampler`.
        images: [B, C, H, W], in about [-1, 1].
        class_labels: [B, label_dim] for conditional networks.
        config: settings without schedule, scaling and noise, see `SamplerConfig.check_encoding`.
        condition: [B, cond_channels, H, W], for networks with a condition image.
    """
    grid = config.levels(net)[:-1].to(images.device)
    solve = (SOLVERS | MULTISTEP)[config.solver or "heun"]
    options = {} if config.order is None else {"order": config.order}
    denoise = _float64_denoiser(net, class_labels, condition)
    return solve(denoise, images.to(torch.float64), grid.flip(0), **options) / grid[0]


def _start(
    latents: torch.Tensor, sigma: torch.Tensor, init: torch.Tensor | None
) -> torch.Tensor:
    """Returns the initial state: noise of level `sigma`, added to `init` if there is one.

    Noise beyond the float32 range saturates, like that of the kernel.
    """
    noise = (latents.to(torch.float64) * sigma).clamp(-_FLOAT32_MAX, _FLOAT32_MAX)
    return noise if init is None else init.to(torch.float64) + noise


def _blend(init: torch.Tensor, keep: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function that pulls a state back to `init`; `keep` is the weight of the state."""
    rest = (1 - keep) * init.to(torch.float64)
    return lambda x: keep * x + rest


def _kernel_noise(net: Callable, randn_like: RandnLike, kernel_scale: KernelScale | None
                  ) -> RandnLike:
    """Returns a function that draws unit-scale noise of the network's D, like its argument."""
    kernel = PerturbationKernel(getattr(net, "D", math.inf))

    def noise_like(x: torch.Tensor) -> torch.Tensor:
        z = randn_like(x)
        scale = kernel.scale(len(x), default_generator(x.device)) if kernel_scale is None else (
            kernel_scale(kernel))
        return per_image(scale, x.ndim) * z

    return noise_like


def _float64_denoiser(
    net: Callable, class_labels: torch.Tensor | None, condition: torch.Tensor | None
) -> Denoiser:
    return lambda x, sigma: evaluate(net, x, sigma, class_labels, condition).to(torch.float64)


def _scaled_churn(net: Callable, denoise: Denoiser, posterior_scale: PosteriorScale) -> dict:
    """Returns the keywords of `churn` for the network's D; none at D = inf."""
    kernel = PerturbationKernel(getattr(net, "D", math.inf))
    if math.isinf(kernel.D):
        return {}
    return {"denoise": denoise, "noise_scale": functools.partial(posterior_scale, kernel)}


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Settings of the sampler, see `sampler`; None stands for the default.

    None for a noise level means the published value of the discretisation. With user-defined
    `sigmas`, `num_steps` is their number, and settings of grids are not allowed. `last` takes only
    the last of the steps, and `num_steps` remains the number of levels of the whole grid.

    Raises:
        ValueError: a name is unknown, or `sigmas` are not numbers or are given with settings of a
            grid.
    """

    num_steps: int = 18
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0
    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0
    solver: str | None = None
    discretization: str | None = None
    schedule: str | None = None
    scaling: str | None = None
    noise_alpha: float = 0.0
    order: int | None = None
    sigmas: tuple[float, ...] | None = None
    last: int | None = None
    stop_sigma: float | None = None
    init_noise: float = 1.0
    blend: float = 1.0

    def __post_init__(self):
        for name, known in (("discretization", DISCRETIZATIONS), ("schedule", SCHEDULES),
                            ("scaling", SCALINGS)):
            if getattr(self, name) not in (None, *known):
                raise ValueError(f"{name}={getattr(self, name)}: must be one of "
                                 f"{', '.join(known)}")
        if self.sigmas is None:
            return
        try:
            if isinstance(self.sigmas, str):
                raise TypeError
            levels = tuple(map(float, self.sigmas))
        except (TypeError, ValueError):
            raise ValueError(f"sigmas={self.sigmas!r}: must be a sequence of numbers") from None
        for name, unset in (("num_steps", (18, len(levels))), ("sigma_min", (None,)),
                            ("sigma_max", (None,)), ("rho", (7,)),
                            ("discretization", (None, "edm"))):
            if getattr(self, name) not in unset:
                raise ValueError(f"{name}={getattr(self, name)} with sigmas: sigmas are the noise "
                                 f"levels; leave {name} out")
        object.__setattr__(self, "sigmas", levels)
        object.__setattr__(self, "num_steps", len(levels))

    @classmethod
    def of_few_steps(cls, few_step: FewStep, num_steps: int | None = None) -> "SamplerConfig":
        """Returns the settings of a few-step network, by default with its own number of steps."""
        steps = len(few_step.levels) if num_steps is None else num_steps
        few_step.of_steps(steps)  # checks the number
        return cls(solver=CONSISTENCY, num_steps=steps)

    @property
    def nfe(self) -> int:
        """Network evaluations per image, without those that churn needs at finite D."""
        return num_evaluations(self.solver, self.last or self.num_steps)

    def levels(self, net: Precond) -> torch.Tensor:
        """Returns the noise levels of the steps, falling, float64.

        They end at 0, or at the level that `last` and `stop_sigma` determine.

        Raises:
            ValueError: the network does not know them, at most `last` of them are above 0, or
                `stop_sigma` is not below the level before it.
        """
        levels = self._grid(net)[0]
        if self.last is not None:
            if not 0 < self.last < self.num_steps:
                raise ValueError(f"last={self.last}: must be 1 or more and less than num_steps="
                                 f"{self.num_steps}, the number of levels above 0")
            levels = levels[-2 - self.last:-1]
        if self.stop_sigma is not None:
            if not 0 <= self.stop_sigma < levels[-2]:
                raise ValueError(f"stop_sigma={self.stop_sigma:g}: must be 0 or more and below "
                                 f"{levels[-2]:.4g}, the level from which the last step starts; "
                                 "give a smaller one")
            levels = torch.cat([levels[:-1], levels.new_tensor([self.stop_sigma])])
        return levels

    def grid_range(self, net: Precond) -> tuple[float, float]:
        """Returns the lowest level above 0 and the highest level of the grid."""
        return self._grid(net)[1:]

    def _grid(self, net: Precond) -> tuple[torch.Tensor, float, float]:
        """Returns the levels falling to 0, float64, the lowest level above 0 and the highest."""
        if self.sigmas is None and self.solver != CONSISTENCY:
            return sigma_grid(self.discretization or "edm", net, self.num_steps, self.sigma_min,
                              self.sigma_max, self.rho)
        levels = given_sigmas(net, net.few_step.of_steps(self.num_steps) if self.sigmas is None
                              else self.sigmas)
        return levels, levels[-2].item(), levels[0].item()

    def check_without_init(self) -> None:
        """Raises ValueError for settings that need images to start from."""
        for name, unused in _OF_INIT.items():
            if getattr(self, name) != unused:
                raise ValueError(f"{name}={getattr(self, name)} without init: there are no images "
                                 f"to start from; give some, or leave {name} out")

    def check_encoding(self) -> None:
        """Raises ValueError if `encode` can't use these settings."""
        if self.solver == CONSISTENCY:
            raise ValueError(f"solver={self.solver}: few-step networks can't encode images; use "
                             "the network from which they were made")
        if self.num_steps < 2:
            raise ValueError(f"num_steps={self.num_steps}: must be 2 or more, because encoding "
                             "needs a step between two levels")
        for name, unused in (("schedule", (None, "linear")), ("scaling", (None, "none")),
                             ("S_churn", (0,)), ("noise_alpha", (0,)), ("last", (None,)),
                           ("stop_sigma", (None,))):
            if getattr(self, name) not in unused:
                raise ValueError(f"{name}={getattr(self, name)}: encoding solves the equation in "
                                 f"sigma without noise; leave {name} out")

    def check(self, net: Precond) -> None:
        """Raises ValueError if these settings can't be used with this network."""
        self.check_solver()
        few_step = getattr(net, "few_step", None)
        if few_step is not None and self.solver != CONSISTENCY:
            raise ValueError(f"solver={self.solver or 'heun'}: a few-step network "
                             f"({few_step.method}) is not a denoiser, which solvers need; give "
                             f"solver={CONSISTENCY}")
        if few_step is None and self.solver == CONSISTENCY and self.sigmas is None:
            raise ValueError(f"solver={self.solver}: the network records no levels for a few "
                             "steps; give another solver, or levels as sigmas")
        for name in ("S_churn", "S_noise", "noise_alpha"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name):g}: must be 0 or more")
        if not 0 <= self.blend <= 1:
            raise ValueError(f"blend={self.blend:g}: must be between 0 and 1")
        if not 0 <= self.init_noise < math.inf:
            raise ValueError(f"init_noise={self.init_noise:g}: must be 0 or more, and finite")
        levels = self.levels(net)[:-1]
        boundary = getattr(net, "boundary", 0)
        if boundary and levels[-1] <= boundary:
            raise ValueError(f"levels down to {levels[-1]:g}: the network returns its input at "
                             f"{boundary:g}, its boundary; all levels must be above that")
        if self.solver in _OF_LOG_SIGMA and (levels.diff() == 0).any():
            raise ValueError(f"num_steps={self.num_steps}: the network rounds some of these levels "
                             f"to equal ones, and solver={self.solver} can't step between them; "
                             "give fewer levels or solver=ipndm")

    def check_solver(self) -> None:
        """Raises ValueError if these settings can't be combined, with any network."""
        if type(self.num_steps) is not int:
            raise ValueError(f"num_steps={self.num_steps}: must be a whole number")
        names = [*SOLVERS, *MULTISTEP, CONSISTENCY]
        if self.solver not in (None, *names):
            raise ValueError(f"solver={self.solver}: must be one of {', '.join(names)}")
        if self.order is not None and self.solver != "ipndm":
            raise ValueError(f"order={self.order}: only ipndm has orders; give solver=ipndm")
        if self.order is not None and (
                type(self.order) is not int or self.order not in ADAMS_BASHFORTH):
            raise ValueError(f"order={self.order}: must be one of "
                             f"{', '.join(map(str, ADAMS_BASHFORTH))}")
        scheduled = [name for name, unused in (("schedule", "linear"), ("scaling", "none"))
                     if getattr(self, name) not in (None, unused)]
        for name, unused in _OF_STEPS.items():
            if scheduled and getattr(self, name) != unused:
                raise ValueError(f"{scheduled[0]}={getattr(self, scheduled[0])} with "
                                 f"{name}={getattr(self, name)}: the latter needs the equation in "
                                 f"sigma; leave {scheduled[0]} out")
        if self.solver in MULTISTEP:
            equation = "solves the equation in sigma; use heun or euler"
            noise = "uses earlier steps, which fresh noise makes useless; use heun or euler"
            if self.blend != 1:
                raise ValueError(f"blend={self.blend:g}: solver={self.solver} uses earlier steps, "
                                 "which blending makes useless; use heun or euler")
        elif self.solver == CONSISTENCY:
            equation = noise = "solves no equation"
        else:
            return
        reasons = {"schedule": (self.schedule not in (None, "linear"), equation),
                   "scaling": (self.scaling not in (None, "none"), equation),
                   "S_churn": (self.S_churn > 0, noise),
                   "noise_alpha": (self.noise_alpha > 0, noise)}
        if self.solver == CONSISTENCY:
            grid = "has its own noise levels"
            reasons |= {"sigma_min": (self.sigma_min is not None, grid),
                        "sigma_max": (self.sigma_max is not None, grid),
                        "rho": (self.rho != 7, grid),
                        "discretization": (self.discretization not in (None, "edm"), grid),
                        "last": (self.last is not None, grid),
                        "stop_sigma": (self.stop_sigma is not None, noise)}
        for name, (is_given, reason) in reasons.items():
            if is_given:
                remedy = f"; leave {name} out" if self.solver == CONSISTENCY else ""
                raise ValueError(f"{name}={getattr(self, name)}: solver={self.solver} {reason}"
                                 f"{remedy}")

    def sample(self, net: Precond, latents: torch.Tensor, class_labels: torch.Tensor | None,
               randn_like: RandnLike, watch: Watch | None = None, *,
               condition: torch.Tensor | None = None, init: torch.Tensor | None = None,
               posterior_scale: PosteriorScale = _posterior_scale,
               kernel_scale: KernelScale | None = None) -> torch.Tensor:
        """Returns samples [B, C, H, W] in float64, see `sampler`."""
        given = {name: value for name, value in dataclasses.asdict(self).items()
                 if value is not None}
        return sampler(net, latents, class_labels, randn_like, **given, watch=watch,
                       condition=condition, init=init, posterior_scale=posterior_scale,
                       kernel_scale=kernel_scale)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Returns clip(x*127.5 + 128, 0, 255) truncated to uint8."""
    return EIGHT_BIT.to_data(images)


@dataclasses.dataclass(frozen=True)
class SampleBatch:
    """Images of consecutive seeds, with the class vector for which each was sampled."""

    seeds: list[int]
    images: torch.Tensor  # [B, C, H, W] float64, in about [-1, 1]
    class_labels: torch.Tensor | None  # [B, label_dim]
    deviations: torch.Tensor | None = None  # [B, C, H, W], if images are means of several samples

    def __getitem__(self, part: slice) -> "SampleBatch":
        labels, deviations = (None if values is None else values[part]
                              for values in (self.class_labels, self.deviations))
        return SampleBatch(self.seeds[part], self.images[part], labels, deviations)


def draw_latents(
    net: Precond, seeds: Sequence[int], device: torch.device, class_idx: int | None = None,
    labels: LabelsOfSeeds | None = None, latents: ImagesOfSeeds | None = None,
    size: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, StackedRandomGenerator]:
    """Returns (unit-scale latents [B, C, H, W] float64, class labels or None, the generators).

    Class and latent are drawn even if `class_idx`, `labels` or `latents` override them, so that all
    other draws of a seed stay the same. `size` is (height, width); None means that of the network.
    """
    channels, *own_size = net.image_shape
    rnd = StackedRandomGenerator(device, seeds)
    z = rnd.randn([len(seeds), channels, *(size or own_size)])
    class_labels = None
    if net.label_dim:
        classes = rnd.randint(net.label_dim, size=[len(seeds)])
        if class_idx is not None:
            classes = torch.full_like(classes, class_idx)
        class_labels = torch.nn.functional.one_hot(classes, net.label_dim).to(torch.float32)
        if labels is not None:
            class_labels = labels(seeds, classes).to(device)
    scale = rnd.kernel_scale(PerturbationKernel(net.D))
    drawn = z.to(torch.float64) * per_image(scale, z.ndim)
    return drawn if latents is None else latents(seeds).to(device), class_labels, rnd


@torch.inference_mode()
def generate_images(
    net: Precond, batches: Iterable[Sequence[int]], *, sampler: SamplerConfig,
    device: torch.device, class_idx: int | None = None, watch: Watch | None = None,
    conditions: ImagesOfSeeds | None = None, inits: ImagesOfSeeds | None = None,
    labels: LabelsOfSeeds | None = None, latents: ImagesOfSeeds | None = None,
    measure: Measure | None = None, factor: int = 1,
) -> Iterator[SampleBatch]:
    """Yields the images of each batch of seeds.

    They have the size of the condition images or of those from which seeds start. Any size works:
    if the network can't halve it, images are padded by reflection (pfgmpp/sizes.py) and cropped at
    the end.

    Args:
        net: the network, on `device`, in evaluation mode; or a denoiser with its attributes, such
            as one of pfgmpp/guidance.py.
        batches: seeds of each batch; empty batches are skipped.
        sampler: settings that were checked against the network.
        device: where to draw and to sample.
        class_idx: sample this class instead of the seeds' own classes.
        watch: called with (state, sigma) before each step of each batch.
        conditions: returns the condition images of seeds, for networks that need them.
        inits: returns the images from which seeds start, at the sampler's sigma_max.
        labels: returns the labels of seeds, given the classes that they draw.
        latents: returns the latents of seeds, in place of those that they draw.
        measure: returns the denoiser for measured images; the images of `inits` are then
            measurements, see pfgmpp/measurement.py.
        factor: the sides of images over those of their measurements.
    """
    for seeds in batches:
        if not seeds:
            continue
        condition, init = (None if images_of is None else images_of(seeds).to(device)
                           for images_of in (conditions, inits))
        frame = _padding(net, condition, init, factor)
        starts, class_labels, rnd = draw_latents(
            net, seeds, device, class_idx, labels, latents,
            [side * factor for side in frame.padded])
        condition = None if condition is None else frame.pad(condition, factor)
        init = None if init is None else frame.pad(init)
        denoiser, init = (net, init) if measure is None else measure(net, init)
        images = sampler.sample(denoiser, starts, class_labels, rnd.randn_like, watch,
                                condition=condition, init=init,
                                posterior_scale=rnd.posterior_scale,
                                kernel_scale=rnd.kernel_scale)
        yield SampleBatch(list(seeds), frame.crop(images, factor), class_labels)


def _padding(net: Precond, condition: torch.Tensor | None, init: torch.Tensor | None,
             factor: int) -> Padding:
    """Returns the padding with which the network can halve images [B, C, H, W].

    The sides of `init` times `factor` are those of the condition and of samples.

    Raises:
        ValueError: the sizes do not match each other.
    """
    sizes = [tuple(side * by for side in images.shape[2:])
             for images, by in ((init, factor), (condition, 1)) if images is not None]
    if len(set(sizes)) > 1:
        (height, width), (other_height, other_width) = sizes
        raise ValueError(f"images to start from give samples of {width}x{height}, but condition "
                         f"images are {other_width}x{other_height}; the sizes must agree")
    size = sizes[0] if sizes else net.image_shape[1:]
    multiple = size_multiple(net)
    return Padding([side // factor for side in size], multiple // math.gcd(multiple, factor))


@torch.inference_mode()
def trajectory(
    net: Precond, seeds: Sequence[int], *, sampler: SamplerConfig, device: torch.device,
    class_idx: int | None = None, conditions: ImagesOfSeeds | None = None,
    inits: ImagesOfSeeds | None = None, labels: LabelsOfSeeds | None = None,
    latents: ImagesOfSeeds | None = None, measure: Measure | None = None, factor: int = 1,
    show: Callable[[torch.Tensor], torch.Tensor] = to_uint8,
) -> list[torch.Tensor]:
    """Returns the states that the sampler passes through, in order: uint8 images [B, C, H, W].

    A state at level sigma is scaled to the standard deviation of the data, so that noise fades into
    the image. The last images are the samples. `show` converts images scaled as for networks to
    uint8. Other arguments are as for `generate_images`.
    """
    frames = []

    def watch(x: torch.Tensor, sigma: torch.Tensor) -> None:
        frames.append(show(x * _SHOWN_STD / (sigma**2 + _SHOWN_STD**2).sqrt()).cpu())

    [batch] = generate_images(net, [seeds], sampler=sampler, device=device, class_idx=class_idx,
                              watch=watch, conditions=conditions, inits=inits, labels=labels,
                              latents=latents, measure=measure, factor=factor)
    height, width = batch.images.shape[2:]
    # The states still have padding, half of it before the images.
    top, left = ((padded - side) // factor // 2 * factor for padded, side in zip(
        frames[0].shape[2:], (height, width), strict=True))
    return [*(frame[:, :, top:top + height, left:left + width] for frame in frames),
            show(batch.images).cpu()]
