"""Two clusters on a plane in many dimensions, at several D: the exact denoiser, and networks.

    N = 1000 data dimension    M = 10 dimension of the plane    D augmented dimensions
    u [M] place on the plane    y = A u + 0.01 e data    n noise of level sigma    x = y + n

u is Normal(+1, 0.2^2) in each of its M coordinates, or Normal(-1, 0.2^2) in each, with equal
probability. A has orthogonal columns of length sqrt(N/M), so that the standard deviation of the
coordinates of y is about 1.

The data are a mixture of two Gaussians, and noise of every D is a Gaussian of random variance v
(pfgmpp/kernel.py). So the ideal denoiser E[y|x] has a closed form for each v, which is averaged
over v by quadrature. It shows the quality of sampling without a network's errors.

The script writes two pictures: toy.png, and noise-norms.png of |n|/(sigma sqrt(N)) at the N of
CIFAR-10.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - the path above

from dnnlib.atomic import atomic_write  # noqa: E402
from dnnlib.cli import HELP_NAMES, run, user_errors  # noqa: E402
from pfgmpp.kernel import PerturbationKernel  # noqa: E402
from pfgmpp.loss import EDMLoss  # noqa: E402
from pfgmpp.networks import MODELS, EDMPrecond  # noqa: E402
from pfgmpp.samplers import SamplerConfig, generate_images  # noqa: E402
from reports.report_plots import check_available  # noqa: E402

N, M = 1000, 10
SPREAD, ROUGHNESS = 0.2, 0.01  # standard deviations of u in a cluster, and of e
SIGMA_DATA = 1.0
ALPHAS = 0.0, 0.2  # noise added before each step, the ends of the published list
BANDWIDTHS = 2.0, 10.0, 50.0  # distances are about 9 within a cluster, and 64 between clusters
RESAMPLINGS = 20  # pairs of real data sets from which sampling noise is estimated
DIMS = (2, 10, 100, 1000, math.inf)
SHOWN_DIMS, SHOWN_PATHS = (2, 100, math.inf), 24
CIFAR_N = 3072
PUBLISHED_DIMS = (64, 128, 2048, 3072000)
CPU = torch.device("cpu")


class Plane:
    """The distribution of the data.

    Args:
        N: data dimension.
        M: dimension of the plane.
    """

    def __init__(self, N: int = N, M: int = M):
        rng = torch.Generator().manual_seed(0)
        self.N, self.M, self.length = N, M, math.sqrt(N / M)
        self.axes = torch.linalg.qr(  # [N, M], orthonormal
            torch.randn(N, M, generator=rng, dtype=torch.float64)).Q

    def draw(self, count: int, rng: torch.Generator) -> torch.Tensor:
        """Returns data [count, N] float64."""
        side = 2 * torch.randint(2, [count, 1], generator=rng) - 1
        u = side + SPREAD * torch.randn(count, self.M, generator=rng, dtype=torch.float64)
        e = torch.randn(count, self.N, generator=rng, dtype=torch.float64)
        return self.length * u @ self.axes.T + ROUGHNESS * e

    def place(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the position of x [B, N] on the line through the clusters, at -1 and 1."""
        return (x.to(torch.float64) @ self.axes).mean(dim=1) / self.length


class IdealDenoiser:
    """E[y|x] of the data of `Plane` under noise of D, [B, N, 1, 1] for any sampler."""

    sigma_min, sigma_max, label_dim = 0.0, math.inf, 0
    round_sigma = staticmethod(torch.as_tensor)
    # The quadrature over ln v: the drop of the log density of ln v from its middle to its ends, a
    # margin for states that do not quite belong to their level, and the spacing in standard
    # deviations of ln v given x, sqrt(2/(N+D)).
    _DEPTH, _MARGIN, _SPACING = 23.0, 0.6, 0.6

    def __init__(self, plane: Plane, D: float):
        self.plane, self.D, self.image_shape = plane, D, (plane.N, 1, 1)
        self.log_v = torch.zeros(1, dtype=torch.float64)  # of v/sigma^2 = D/c
        self.log_prior = torch.zeros(1, dtype=torch.float64)  # of ln v, up to a constant
        if not math.isinf(D):
            def log_prior(log_v):  # its maximum, at 0, is 0
                return -D / 2 * (log_v + (-log_v).exp() - 1)

            step = self._SPACING * math.sqrt(2 / (plane.N + D))
            ends = -math.sqrt(4 * self._DEPTH / D), 1 + 2 * self._DEPTH / D  # loose bounds
            log_v = torch.arange(*ends, step, dtype=torch.float64)
            inside = log_v[log_prior(log_v) > -self._DEPTH]
            self.log_v = torch.arange(float(inside[0]) - self._MARGIN,
                                      float(inside[-1]) + self._MARGIN, step, dtype=torch.float64)
            self.log_prior = log_prior(self.log_v)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, class_labels=None) -> torch.Tensor:
        """Returns the posterior mean in x's shape, float64."""
        plane, shape = self.plane, x.shape
        x = x.to(torch.float64).flatten(1)
        centre = plane.length * torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
        within = (plane.length * SPREAD) ** 2 + ROUGHNESS**2  # variances of y on and off the plane
        v = float(sigma) ** 2 * self.log_v.exp()  # [V]
        on = x @ plane.axes  # [B, M]
        off = x - on @ plane.axes.T
        squared = (on[:, None] - centre).square().sum(dim=2, keepdim=True)  # [B, 2, 1]
        log_w = self.log_prior - (
            squared / (within + v) + plane.M * (within + v).log()
            + off.square().sum(dim=1).reshape(-1, 1, 1) / (ROUGHNESS**2 + v)
            + (plane.N - plane.M) * (ROUGHNESS**2 + v).log()) / 2
        w = log_w.flatten(1).softmax(dim=1).reshape(log_w.shape)  # [B, 2, V]
        shrink = (w * within / (within + v)).sum(dim=2)  # [B, 2]
        mean = (w.sum(dim=2) - shrink) @ centre + shrink.sum(dim=1, keepdim=True) * on
        rough = (w * ROUGHNESS**2 / (ROUGHNESS**2 + v)).sum(dim=[1, 2])
        return (mean @ plane.axes.T + rough[:, None] * off).reshape(shape)


class MLP(torch.nn.Module):
    """F for vectors, as in docs/extending.md, plus a multiple of x that depends on the noise level.

    The part of x off the plane has more dimensions than a hidden layer, so the layers can't
    subtract it. Without the multiple, samples would keep it.
    """

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, width=128):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(in_channels + 1, width), torch.nn.SiLU(),
            torch.nn.Linear(width, width), torch.nn.SiLU(), torch.nn.Linear(width, out_channels))
        self.gain = torch.nn.Sequential(
            torch.nn.Linear(1, width), torch.nn.SiLU(), torch.nn.Linear(width, 1))

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        """Returns F(x; c_noise) in x's shape."""
        noise = (4 * noise_labels.reshape(-1, 1).expand(len(x), 1)).to(x.dtype)  # ln sigma
        out = self.layers(torch.cat([x.flatten(1), noise], dim=1))
        return (out + self.gain(noise) * x.flatten(1)).reshape(x.shape)


MODELS["ToyMLP"] = MLP


def train(plane: Plane, D: float, num_steps: int, batch: int = 128) -> EDMPrecond:
    """Returns a network trained to denoise at D; one seed gives the same draws at every D."""
    torch.manual_seed(0)
    noise = {"pfgmpp": not math.isinf(D), "D": D}
    net = EDMPrecond(1, plane.N, model_type="ToyMLP", sigma_data=SIGMA_DATA, **noise)
    loss_fn = EDMLoss(sigma_data=SIGMA_DATA, **noise)
    optimizer = torch.optim.Adam(net.parameters())
    rng = torch.Generator().manual_seed(0)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / num_steps)
        data = plane.draw(batch, rng).reshape(batch, plane.N, 1, 1)
        loss = loss_fn(net, data, draws=loss_fn.draw(data.shape, rng)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


# ----------------------------------------------------------------------------------- measuring


def mmd2(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the squared maximum mean discrepancy of two sets of vectors, 0 or more.

    The kernel is the mean of Gaussians of `BANDWIDTHS`. This is the V-statistic, which is positive
    even for two sets from the same distribution, so compare it with the value for two such sets.
    """
    def kernel(x, y):
        squared = torch.cdist(x, y).square()
        return sum((-squared / (2 * h**2)).exp().mean() for h in BANDWIDTHS) / len(BANDWIDTHS)
    return float(kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))


class Score(NamedTuple):
    """The measured properties of a set of samples."""

    mmd2: float  # squared MMD to real data
    spread: float  # standard deviation of u around its cluster, 0.2 in the data
    off: float  # root mean square off the plane, median over samples; 0.01 in the data
    share: float  # share of the cluster at +1, 0.5 in the data


def score(plane: Plane, samples: torch.Tensor, real: torch.Tensor) -> Score:
    """Returns the scores of samples [B, N] against equally many real data."""
    on = samples @ plane.axes
    side = plane.place(samples).sign()
    off = (samples - on @ plane.axes.T).square().sum(dim=1) / (plane.N - plane.M)
    return Score(mmd2(samples, real), float((on / plane.length - side[:, None]).std()),
                 float(off.median().sqrt()), float((side > 0).double().mean()))


def sample(net: Callable, count: int, alpha: float = 0.0) -> torch.Tensor:
    """Returns samples [count, N] float64 of the seeds 0, 1, ... with the default sampler."""
    [batch] = generate_images(net, [range(count)], sampler=SamplerConfig(noise_alpha=alpha),
                              device=CPU)
    return batch.images.flatten(1)


def paths(net: Callable, plane: Plane, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the noise levels [n] and the positions [n, count] of the paths of seeds 0, 1, ..."""
    levels, places = [], []

    def watch(x, sigma):
        levels.append(sigma)
        places.append(plane.place(x.flatten(1)))
    list(generate_images(net, [range(count)], sampler=SamplerConfig(num_steps=60), device=CPU,
                         watch=watch))
    return torch.stack(levels), torch.stack(places)


def noise_norms(D: float, N: int, count: int) -> torch.Tensor:
    """Returns |n|/(sigma sqrt(N)) of `count` draws of the kernel, [count] float32."""
    rng = torch.Generator().manual_seed(0)
    noise = PerturbationKernel(D).sample((count, N), 1.0, rng)
    return noise.norm(dim=1) / math.sqrt(N)


# ------------------------------------------------------------------------------------ pictures


@contextlib.contextmanager
def picture(path: Path, size: tuple[float, float]) -> Iterator:
    """Yields a figure of `size` in inches; writes it to a PNG file."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({
            "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
            "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6,
            "axes.axisbelow": True, "axes.titlesize": 9, "legend.fontsize": 8,
            "legend.framealpha": 1, "legend.edgecolor": "white"})
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=150)


def style(D: float, dims: tuple[float, ...]) -> dict:
    """Returns the colour and dashes of D: D = inf is black, the others follow their order."""
    from matplotlib import colormaps

    if math.isinf(D):
        return {"color": "black", "linestyle": "-"}
    finite = sorted(d for d in dims if not math.isinf(d))
    colour = colormaps["viridis"](0.75 * finite.index(D) / max(len(finite) - 1, 1))
    return {"color": colour, "linestyle": ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))[
        finite.index(D) % 4]}


def draw_norms(axes, N: int, dims: tuple[float, ...], count: int, ticks: tuple[float, ...]) -> None:
    """Draws the density of ln(|n|/(sigma sqrt(N))) for each D."""
    for D in dims:
        norms = noise_norms(D, N, count).log()
        bins = torch.linspace(*norms.quantile(torch.tensor([0.002, 0.998])).tolist(), 30)
        density = torch.histogram(norms, bins, density=True).hist
        axes.plot(((bins[1:] + bins[:-1]) / 2).exp(), density, label=f"D = {D:g}", **style(D, dims))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(ticks[0], ticks[-1])
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("|n| / (sigma sqrt(N))")
    axes.set_ylabel("density of its logarithm")
    axes.set_title(f"norm of the noise, N = {N}")
    axes.legend()


def draw_norm_quantiles(axes, N: int, count: int) -> None:
    """Draws quantiles of |n|/(sigma sqrt(N)) over D, and those of the Gaussian shell."""
    dims = (10 ** torch.linspace(0, 7, 22)).tolist()
    quantiles = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99])
    low, lower, middle, upper, high = torch.stack(
        [noise_norms(D, N, count).quantile(quantiles) for D in dims], dim=1)
    axes.fill_between(dims, low, high, color="#0068a8", alpha=0.2, linewidth=0, label="1% to 99%")
    axes.fill_between(dims, lower, upper, color="#0068a8", alpha=0.45, linewidth=0,
                      label="25% to 75%")
    axes.plot(dims, middle, color="#0068a8", label="median")
    ends = noise_norms(math.inf, N, count).quantile(quantiles)
    for k, name in ((0, "D = inf: 1% and 99%"), (4, None)):
        axes.axhline(ends[k], color="black", linestyle="--", linewidth=0.9, label=name)
    for k, D in enumerate(PUBLISHED_DIMS):
        axes.axvline(D, color="#777777", linestyle=":", linewidth=0.9,
                     label=None if k else "D = " + ", ".join(map(str, PUBLISHED_DIMS)))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(0.3, 100)
    axes.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
    axes.set_yticks([], minor=True)
    axes.set_xlabel("augmented dimensions D")
    axes.set_ylabel("|n| / (sigma sqrt(N))")
    axes.set_title(f"its quantiles over D, N = {N}")
    axes.legend()


def draw_paths(axes, D: float, levels: torch.Tensor, places: torch.Tensor) -> None:
    """Draws positions over the noise level, which falls to the right."""
    axes.plot(levels, places, color="#0068a8", linewidth=0.7, alpha=0.8)
    axes.axhline(-1, color="black", linestyle="--", linewidth=0.9)
    axes.axhline(1, color="black", linestyle="--", linewidth=0.9)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_ylim(-10, 10)
    axes.set_xlabel("noise level sigma")
    axes.set_title(f"paths of {places.shape[1]} seeds, D = {D:g}")


def draw_scores(axes, field: str, scores: dict) -> None:
    """Draws one field of the scores over D, a line per way of sampling."""
    marks = iter("os^v")
    for name, of_dims in scores.items():
        values = [getattr(of_dims[D], field) for D in DIMS]
        learned = name.startswith("network")
        axes.plot(range(len(DIMS)), values, marker=next(marks), label=name,
                  color="#c04a00" if learned else "#0068a8",
                  linestyle="-" if name.endswith("0") else "--",
                  markerfacecolor="white" if learned else None)
    axes.set_xticks(range(len(DIMS)), [f"{D:g}" for D in DIMS])
    axes.set_xlabel("augmented dimensions D")


def write_pictures(outdir: Path, plane: Plane, scores: dict, real_scores: list[Score],
                   count: int) -> None:
    """Writes the two pictures to `outdir`."""
    with picture(outdir / "toy.png", (9, 5.6)) as figure:
        above, below = figure.subplots(2, 3)
        for axes, D in zip(above, SHOWN_DIMS, strict=True):
            draw_paths(axes, D, *paths(IdealDenoiser(plane, D), plane, SHOWN_PATHS))
        above[0].set_ylabel("place between the clusters,\nwhich are at -1 and 1")
        draw_norms(below[0], plane.N, DIMS, 20 * count, (0.3, 0.5, 1, 2, 5, 10, 20))
        draw_scores(below[1], "spread", {
            name: of for name, of in scores.items() if name.startswith("ideal")})
        below[1].axhline(SPREAD, color="black", linewidth=0.9)
        below[1].set_title("spread in a cluster, ideal denoiser")
        below[1].set_ylabel("standard deviation of u (data: 0.2)")
        below[1].legend()
        draw_scores(below[2], "mmd2", scores)
        values = [s.mmd2 for s in real_scores]
        below[2].axhspan(min(values), max(values), color="black", alpha=0.25, linewidth=0,
                         label="real against real")
        below[2].set_yscale("log")
        below[2].set_title("discrepancy from real data")
        below[2].set_ylabel("squared MMD")
        below[2].legend()
    with picture(outdir / "noise-norms.png", (9, 3.4)) as figure:
        left, right = figure.subplots(1, 2)
        draw_norms(left, CIFAR_N, (64, 128, 2048, math.inf), 5 * count,
                   (0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5))
        draw_norm_quantiles(right, CIFAR_N, 3 * count)


# ----------------------------------------------------------------------------------------- main


@click.command(context_settings={"show_default": True, **HELP_NAMES})
@click.option("--outdir", metavar="DIR", default="toy", help="Folder for the two pictures.")
@click.option("--train-steps", metavar="INT", type=click.IntRange(min=1), default=300,
              help="Number of training steps per network.")
@click.option("--samples", metavar="INT", type=click.IntRange(min=2), default=1000,
              help="Number of samples per network, and of real data to compare them with.")
def main(outdir: str, train_steps: int, samples: int) -> None:
    """Trains networks of several D on two clusters, samples from them and plots the results."""
    with user_errors():
        check_available("the pictures of docs/toy.py need")
        start = time.monotonic()
        plane, rng = Plane(), torch.Generator().manual_seed(1)
        real = plane.draw(samples, rng)
        real_scores = [score(plane, plane.draw(samples, rng), real) for _ in range(RESAMPLINGS)]
        for name, pick in (("lowest", min), ("highest", max)):
            report(f"real data, {name} of {RESAMPLINGS}",
                   Score(*map(pick, zip(*real_scores, strict=True))))
        scores: dict[str, dict[float, Score]] = {}
        for kind, make, alphas in (("ideal", lambda D: IdealDenoiser(plane, D), ALPHAS),
                                   ("network", lambda D: train(plane, D, train_steps), ALPHAS[:1])):
            for D in DIMS:
                net = make(D)
                for alpha in alphas:
                    found = score(plane, sample(net, samples, alpha), real)
                    scores.setdefault(f"{kind}, alpha = {alpha:g}", {})[D] = found
                    report(f"{kind}, D = {D:g}, alpha = {alpha:g}", found)
        Path(outdir).mkdir(parents=True, exist_ok=True)
        write_pictures(Path(outdir), plane, scores, real_scores, samples)
        click.echo(f"{outdir}/toy.png and {outdir}/noise-norms.png, "
                   f"after {time.monotonic() - start:.0f} s")


def report(name: str, found: Score) -> None:
    """Prints scores on one line."""
    click.echo(f"{name:30}  squared MMD {found.mmd2:.5f}  spread {found.spread:.4f}  "
               f"off plane {found.off:.4f}  share {found.share:.3f}")


if __name__ == "__main__":
    run(main)
