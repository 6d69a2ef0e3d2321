"""The steps of a study of networks as commands, and which of them are done; needs no PyTorch.

The default point of a network has `base_steps` steps, no noise and all bits. Around it, alpha,
steps and bits vary one at a time.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from checkpoints.names import newest_network
from dnnlib.plugins import Plugin
from dnnlib.util import format_ranges
from images.image_files import GENERATE_RECORD
from reports.run_record import OF_PLUGIN, REPORT_PREFIX, RunRecord, Score, read_json, read_scores
from sampling.folders import FolderName, image_name
from sampling.sweeps import CONSISTENCY, FULL_BITS
from training.config import OPTIONS_FILE
from training.resume import RESUME_MAY_CHANGE

_NO_TAG = "NNNNNN"
# Options of train.py that do not affect the training, or only its duration.
_FREE = RESUME_MAY_CHANGE.keys() - {"data", "seed", "transfer"}
# The recorded names of --metrics, for the published Inception weights and for other features.
_RECORDED = {"fid": {"fid", "frechet_distance"}, "kid": {"kid", "kernel_distance"},
             "pr": {"precision"}, "dc": {"density"}, "is": {"is"}, "ca": {"class_accuracy"}}
_BASE_STEPS = 18
_LIKELIHOOD_STEPS = 32
_LIKELIHOOD_SETTINGS = {"probes": "1", "seed": "0", "cond": "True"}  # as they are recorded
# Four evaluations per step, each with a trace (two more), and again with half as many steps.
_EVALUATIONS_OF_LIKELIHOOD = 3 * 4 * (_LIKELIHOOD_STEPS + _LIKELIHOOD_STEPS // 2)
_LSUN_START = (("sigma_max", "380.0"),)
_FIELDS = {"alpha": "noise_alpha", "steps": "num_steps", "bits": "bits"}


@dataclasses.dataclass(frozen=True)
class Step:
    """A titled step; `words()` returns the script and its arguments, or None if it is done.

    `evaluations(words)` returns how often this command evaluates a network, as the equivalent
    number of forward passes for one image.
    """

    title: str
    words: Callable[[], list[str] | None]
    evaluations: Callable[[list[str]], float] = lambda words: 0


@dataclasses.dataclass(frozen=True)
class Study:
    """How every network is scored; the fields are named after the flags of sweep.py.

    `detector_name` is the name that scores record for `detector`.
    """

    ref: str
    metrics: str
    detector: str
    detector_name: str
    seeds: tuple[int, ...]
    ranges: int
    base_steps: int | None  # None = 18, or the own number of a few-step network
    alpha: tuple[float, ...] | None
    steps: tuple[int, ...] | None
    bits: tuple[int, ...] | None
    images: int
    device: str
    solver: str | None = None
    order: int | None = None
    rounding_seeds: tuple[int, ...] | None = None  # for `bits`; None rounds to the nearest level
    likelihood: int | None = None  # number of images of `val_data` to measure
    likelihood_metric: str = "bits_per_dim"  # its recorded name, which depends on the data
    val_data: str | None = None
    plugin: Plugin | None = None

    def steps_of(self, run_dir: Path) -> list[Step]:
        """Returns the steps that score a run and sample it for the report."""
        def step(what: str, words: Callable[[], list[str] | None]) -> Step:
            return Step(f"{run_dir.name}: {what}", words, self._evaluations)

        steps = [step("scores", lambda: self._base_words(run_dir))]
        for flag in _FIELDS:
            draws = self.rounding_seeds if flag == "bits" and self.rounding_seeds else [None]
            if getattr(self, flag):
                steps += [step(flag if draw is None else f"{flag}, rounding seed {draw}",
                               lambda flag=flag, draw=draw: self._axis_words(run_dir, flag, draw))
                          for draw in draws]
        if self.likelihood:
            steps.append(step("likelihood", lambda: self._likelihood_words(run_dir)))
        if self.images:
            steps.append(step("images", lambda: self._image_words(run_dir)))
        return steps

    def _evaluations(self, words: list[str]) -> float:
        """Returns how often a command of `steps_of` evaluates a network, as in `Step`."""
        given = dict(word.removeprefix("--").partition("=")[::2] for word in words)
        steps = [int(number) for number in given.get("steps", "0").split(",")]
        if words[0] == "likelihood.py":
            return self.likelihood * _EVALUATIONS_OF_LIKELIHOOD
        images = self.images if words[0] == "generate.py" else len(self.seeds)
        points = len(given.get("alpha", given.get("bits", "")).split(","))
        from pfgmpp.solvers import num_evaluations  # imports PyTorch
        solver = CONSISTENCY if _few_step(Path(given["network"]).parent) else self.solver
        once = sum(num_evaluations(solver, number) for number in steps)
        return images * once * points * int(given.get("ranges", 1))

    def score_words(self, network: Path, seeds: str, *flags: str) -> list[str]:
        """Returns the command that scores the images of `seeds`."""
        same = [f"--{key}={getattr(self, key)}" for key in ("ref", "metrics", "detector", "device")]
        return ["fid.py", "gen", f"--network={network}", *same, f"--seeds={seeds}", *self._solver,
                *flags, *self._plugin]

    @property
    def _plugin(self) -> list[str]:
        """The flag of the plugin, if there is one."""
        return [self.plugin.flag] if self.plugin else []

    @property
    def _solver(self) -> list[str]:
        """The flags of the solver; none for the default solver."""
        return [f"--{name}={value}" for name, value in self._method.items()]

    @property
    def _method(self) -> dict[str, Any]:
        usual = {"solver": "heun", "order": 3}
        return {name: getattr(self, name) for name in usual
                if getattr(self, name) not in (None, usual[name])}

    def _base_words(self, run_dir: Path) -> list[str] | None:
        """Returns the command for the seed ranges from the first unscored one on."""
        span = max(self.seeds) - min(self.seeds) + 1
        for i in range(self.ranges):
            seeds = format_ranges(seed + i * span for seed in self.seeds)
            if not self._is_scored(run_dir, seeds):
                return self.score_words(network_of(run_dir)[0], seeds,
                                        f"--steps={self._base(run_dir)}",
                                        f"--ranges={self.ranges - i}")
        return None

    def _axis_words(self, run_dir: Path, flag: str, draw: int | None) -> list[str] | None:
        """Returns one command for all unscored values of an axis.

        `draw` is the seed of random rounding.
        """
        seeds = format_ranges(self.seeds)
        values = [value for value in getattr(self, flag) if draw is None or value < FULL_BITS]
        left = [f"{value:.15g}" for value in values
                if not self._is_scored(run_dir, seeds, **{_FIELDS[flag]: value,
                                                          "rounding_seed": draw})]
        if not left:
            return None
        more = [] if flag == "steps" else [f"--steps={self._base(run_dir)}"]
        more += [] if draw is None else [f"--rounding-seed={draw}"]
        return self.score_words(network_of(run_dir)[0], seeds, *more, f"--{flag}={','.join(left)}")

    def _likelihood_words(self, run_dir: Path) -> list[str] | None:
        """Returns the command that measures the likelihood of held-out images; None if done."""
        network = network_of(run_dir)[0]
        done = [score for score in (read_scores(run_dir) if run_dir.is_dir() else [])
                if score.metric == self.likelihood_metric and score.network == network.name
                and score.reference == self.val_data and score.num == self.likelihood
                and score.num_steps == _LIKELIHOOD_STEPS
                and _LIKELIHOOD_SETTINGS.items() <= dict(score.other).items()
                and self._is_of(score, network)]
        return None if done else [
            "likelihood.py", f"--network={network}", f"--data={self.val_data}",
            f"--count={self.likelihood}", f"--device={self.device}", *self._plugin]

    def _is_of(self, score: Score, network: Path) -> bool:
        """Returns whether a score is of a network's current weights, as far as is recorded."""
        return score.weights in ("", _weights_of(network, *_stamp(network)))

    def _is_scored(self, run_dir: Path, seeds: str, **point: float) -> bool:
        """Returns whether all metrics of a point are recorded for the run's newest network."""
        network = network_of(run_dir)[0]
        sought = {"network": network.name, "seeds": seeds, "reference": self.ref,
                  "detector": self.detector_name, "num_steps": self._base(run_dir),
                  "noise_alpha": 0, "bits": FULL_BITS, "rounding_seed": None, **point}
        # --lsun networks have their own highest noise level, which their sampler records.
        few_step = _few_step(run_dir)
        given = self._method if few_step is None else {"few_step": few_step["method"],
                                                       "solver": CONSISTENCY}
        method = tuple((name, str(value)) for name, value in given.items())
        plain = [tuple(sorted(method + start))
                 for start in [(), *([_LSUN_START] if _is_lsun(run_dir) else [])]]
        own = {(name, self.plugin.sha256[:16]) for name in OF_PLUGIN} if self.plugin else set()
        scores = [score for score in (read_scores(run_dir) if run_dir.is_dir() else [])
                  if tuple(item for item in score.other if item not in own) in plain
                  and all(getattr(score, name) == value for name, value in sought.items())]
        found = {score.metric for score in scores if self._is_of(score, network)}
        return all(found & _recorded_as(metric) for metric in self.metrics.split(","))

    def _image_words(self, run_dir: Path) -> list[str] | None:
        network, tag = network_of(run_dir)
        folder = run_dir / f"{REPORT_PREFIX}{FolderName(tag)}"
        if self._has_images(folder, network):
            return None
        return ["generate.py", f"--network={network}", f"--outdir={folder}", "--subdirs",
                f"--seeds=0-{self.images - 1}", f"--steps={self._base(run_dir)}", *self._solver,
                f"--device={self.device}", *self._plugin]

    def _base(self, run_dir: Path) -> int:
        """Returns the steps of the default point of a run."""
        few_step = _few_step(run_dir)
        return self.base_steps or (len(few_step["levels"]) if few_step else _BASE_STEPS)

    def _has_images(self, folder: Path, network: Path) -> bool:
        """Returns whether the images of this network for the report exist.

        Raises:
            ValueError: the images in the folder are of another network.
        """
        record = read_json(folder / GENERATE_RECORD)
        if not record:
            return False
        if record.get("weights") != _weights_of(network, *_stamp(network)):
            raise ValueError(f"{folder}: holds images of another network called {network.name}; "
                             "remove this folder")
        return all(any((folder / image_name(seed, subdirs=True, extension=extension)).exists()
                       for extension in (".png", ".npy")) for seed in range(self.images))


def _recorded_as(metric: str) -> set[str]:
    """Returns names, any of which shows that a metric is recorded."""
    if metric in _RECORDED:
        return _RECORDED[metric]
    from metrics.metrics import METRICS  # a plugin's metric; the plugin has already imported it
    return set(METRICS[metric].values)


def _few_step(run_dir: Path) -> dict[str, Any] | None:
    """Returns the few-step settings of a run's network; None if it is a denoiser."""
    network = read_json(run_dir / OPTIONS_FILE).get("network")
    found = network.get("few_step") if isinstance(network, dict) else None
    return found if isinstance(found, dict) and {"method", "levels"} <= found.keys() else None


def is_few_step(run_dir: Path) -> bool:
    """Returns whether a run trains a few-step network."""
    return _few_step(run_dir) is not None


def _is_lsun(run_dir: Path) -> bool:
    options = read_json(run_dir / OPTIONS_FILE).get("options")
    return isinstance(options, dict) and bool(options.get("lsun"))


def _stamp(path: Path) -> tuple[int, int]:
    """Returns size and time of a file, which reveal a replaced file; zeros if there is none."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=64)
def _weights_of(network: Path, size: int, mtime_ns: int) -> str:
    """Returns the sha256 of a network's weights, as scores and images record it.

    Raises:
        OSError, ValueError: it can't be read.
    """
    from checkpoints import checkpoint  # imports PyTorch, which nothing else here needs
    return checkpoint.digest(checkpoint.sampling_weights(checkpoint.load(network)))


def network_of(run_dir: Path) -> tuple[Path, str]:
    """Returns a run's newest network and the number in its name; placeholders if there is none."""
    return newest_network(run_dir) or (run_dir / f"network-snapshot-{_NO_TAG}.pt", _NO_TAG)


def has_network(run_dir: Path) -> bool:
    """Returns whether a run has a network to score."""
    return newest_network(run_dir) is not None


def train_step(run_dir: Path, words: list[str], asked: dict[str, Any]) -> Step:
    """Returns the step that starts or continues the training of a network in `run_dir`.

    `words` is the command without --resume, and `asked` the options of train.py that it sets.
    """
    return Step(f"{run_dir.name}: training",
                lambda: None if _is_trained(run_dir, asked) else [*words, "--resume=auto"])


def images_to_train(run_dir: Path, asked: dict[str, Any]) -> int:
    """Returns the number of images on which a run of `train_step` must still be trained."""
    total = max(round(asked["duration"] * 1e6), 1)
    if not (run_dir / OPTIONS_FILE).exists():
        return total
    ticks = RunRecord.read(run_dir).ticks
    return max(total - round(1e3 * ticks[-1]["kimg"]), 0) if ticks else total


def measured_rate(runs: Sequence[Path]) -> float | None:
    """Returns the median training speed of runs in images per second; None if unknown."""
    rates = [tick["images_per_sec"] for run in runs if (run / OPTIONS_FILE).exists()
             for tick in RunRecord.read(run).ticks if "images_per_sec" in tick]
    return statistics.median(rates) if rates else None


def _is_trained(run_dir: Path, asked: dict[str, Any]) -> bool:
    """Returns whether a run is finished; raises ValueError if it was begun with other settings."""
    if not (run_dir / OPTIONS_FILE).exists():
        return False
    run = RunRecord.read(run_dir)
    for key in sorted((run.options.keys() & asked.keys()) - _FREE):
        there, now = run.options[key], asked[key]
        if key == "sigma_data" and now is None:  # auto, which records the measured number
            continue
        if key == "data":  # the folders that hold it may have moved
            there, now = Path(there).name, Path(now).name
        if there != (list(now) if isinstance(now, tuple) else now):
            raise ValueError(f"{run_dir}: was begun with {key} = {there}, but {key} = {now} was "
                             "given; give another --name")
    if not run.ticks or not has_network(run_dir):
        return False
    kimg, tag = run.ticks[-1]["kimg"], network_of(run_dir)[1]
    is_written = float(tag) >= (kimg if "." in tag else math.floor(kimg))
    return is_written and round(kimg * 1e3) >= round(asked["duration"] * 1e6)


def report_step(out: Path, runs: Sequence[Path]) -> Step:
    """Returns the step that writes the report, which is done if no file of the runs is newer."""
    def words():
        changed = [path.stat().st_mtime for run in runs if run.is_dir() for path in run.iterdir()]
        if out.exists() and out.stat().st_mtime >= max(changed, default=0.0):
            return None
        return ["report.py", *map(str, runs), f"--out={out}"]
    return Step("report", words)
