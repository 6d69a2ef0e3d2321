"""The content of a run directory as plain data; no PyTorch is needed.

    training_options.json    what was trained, and where
    stats.jsonl              one JSON object per tick
    metrics.jsonl            one JSON object per score
    samples-*.png, ckpt_*/   pictures

Directories can be read while the run is active and after it was killed. Notes list what is missing
or damaged.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from checkpoints.names import KIMG, kimg_of_network
from images.image_files import GENERATE_RECORD
from metrics.score_names import OF_PAIRS, SCORES_FILE
from sampling.folders import FolderName
from sampling.sweeps import FULL_BITS
from training.config import LOG_FILE, OPTIONS_FILE, REALS_FILE, STATS_FILE

_SAMPLES_NAME = re.compile(rf"samples-({KIMG})\.png")
_TOTAL_LINE = re.compile(r"^total +\S+ +([\d,]+)$", re.M)  # in the parameter table of log.txt
# The defaults of sampler settings, see pfgmpp.samplers.SamplerConfig.
SAMPLER_DEFAULTS = [("rho", 7), ("S_churn", 0), ("S_min", 0), ("S_max", "inf"), ("S_noise", 1),
                    ("precision", "fp32"), ("solver", "heun"), ("discretization", "edm"),
                    ("schedule", "linear"), ("scaling", "none"), ("order", 3),
                    ("init_noise", 1), ("blend", 1)]
# The first three are the axes of sweeps; comparisons ignore the others.
_NOT_COMPARED = {"num_steps", "noise_alpha", "bits", "D", "weights", "device", "subdirs", "nfe",
                 "rounding_seed",  # distinguishes draws at one number of bits
                 "network", "gnet_network",  # hashes, like that of the weights
                 "network_plugin", "gnet_plugin",  # hashes
                 # Properties of the network's data.
                 "scale", "empty_classes", "empty_class_numbers", "class_counts",
                 "levels"}  # of few-step networks; they follow from num_steps
_TICK_KEYS = {"kimg": "Progress/kimg", "loss": "Loss/loss", "val_loss": "Loss/val",
              "lr": "Progress/lr", "bad_steps": "Progress/bad_steps",
              "cpu_mem_gb": "Resources/cpu_mem_gb", "gpu_mem_gb": "Resources/peak_gpu_mem_gb"}
_SCORE_PREFIX = "Metrics/"
_OF_CLASS = "of class"  # a setting of per-class scores
MEAN_OF_CLASSES = "mean"  # its value for the mean over classes
OF_PLUGIN = ("plugin", "metric of")  # settings of a plugin's solvers and metrics
REPORT_PREFIX = "report_"  # of folders with images for the report, which are too few for scores


@dataclasses.dataclass(frozen=True)
class Score:
    """One value of one metric; None and '' stand for unknown entries."""

    metric: str  # its recorded name
    value: float  # finite
    kimg: float | None = None  # thousands of images that the network has seen
    D: float | None = None  # augmented dimensions of the network
    num: int | None = None  # number of images
    seeds: str = ""  # seeds of the images
    num_steps: int | None = None
    noise_alpha: float = 0.0  # strength of the noise before each step
    bits: int = FULL_BITS  # bits of the weights
    detector: str = ""  # name of the detector
    reference: str = ""  # as it was given
    reference_sha256: str = ""  # hash of its content
    network: str = ""  # its file name; '' if images were scored
    # Sampler settings that are not the default, the range of pair scores, and the class.
    other: tuple[tuple[str, str], ...] = ()
    weights: str = ""  # sha256 of the network's weights; '' if not recorded
    nfe: int | None = None  # evaluations of the network per image; None if not recorded
    rounding_seed: int | None = None  # seed of random rounding; None for nearest rounding

    @property
    def of_class(self) -> str | None:
        """The class of a per-class score, 'mean' for the mean over classes, or None."""
        return dict(self.other).get(_OF_CLASS)

    @property
    def is_plain(self) -> bool:
        """Whether no noise was added and the weights were not rounded."""
        return self.noise_alpha == 0 and self.bits == FULL_BITS


@dataclasses.dataclass(frozen=True)
class SampleFolder:
    """Images of one state of a run, by seed, and the sampler settings."""

    kimg: float
    settings: tuple[tuple[str, str], ...]
    paths: dict[int, Path]


class NotARunError(ValueError):
    """A folder holds no files of a run."""


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The recorded data of a run.

    Each tick has 'kimg' and, if recorded, 'loss', 'val_loss', 'lr', 'bad_steps', 'images_per_sec',
    'cpu_mem_gb' and 'gpu_mem_gb'.
    """

    path: Path
    options: dict[str, Any]  # the training options as they were written, {} if unknown
    settings: dict[str, str]  # options, data and machine as shown in a report, by title
    ticks: list[dict[str, float]]
    scores: list[Score]  # in the order in which they were written
    samples: list[tuple[float, Path]]  # (kimg, picture) by rising kimg
    notes: list[str]  # what is missing or damaged, one line each

    @classmethod
    def read(cls, path: str | os.PathLike) -> "RunRecord":
        """Returns the record of a run directory.

        Raises:
            NotARunError: it is not a run directory.
            OSError: it can't be read.
        """
        path, notes = Path(path), []
        names = {entry.name for entry in os.scandir(path)}
        samples = sorted((float(match[1]), path / match[0])
                         for match in filter(None, map(_SAMPLES_NAME.fullmatch, names)))
        if not names & {OPTIONS_FILE, STATS_FILE, SCORES_FILE} and not samples:
            raise NotARunError(f"{path}: not a run directory (no {OPTIONS_FILE}, {STATS_FILE} or "
                               f"{SCORES_FILE}), and contains none")
        record = read_json(path / OPTIONS_FILE)
        if not record:
            notes.append(f"{OPTIONS_FILE} is missing, empty or damaged; the settings are unknown")
        options = _dict(record.get("options"))
        D = _D_of(options)
        lines = _json_lines(path / STATS_FILE, notes)
        scores = read_scores(path, D, notes)
        known = {(score.kimg, score.value) for score in scores}
        detector = options.get("eval_detector")
        scores += [score for score in _scores_of_stats(
            lines, D, detector if isinstance(detector, str) else "")
                   if (score.kimg, score.value) not in known]
        return cls(path, options, _settings(record, D, path / LOG_FILE), _ticks(lines), scores,
                   samples, notes)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def D(self) -> float | None:
        """The number of augmented dimensions, inf for diffusion; None if unknown."""
        found = [_D_of(self.options), *(score.D for score in self.scores)]
        return next((D for D in found if D is not None), None)

    @property
    def reals(self) -> Path | None:
        """The grid of training images, None if there is none."""
        path = self.path / REALS_FILE
        return path if path.is_file() else None

    @functools.cached_property
    def sample_folder(self) -> SampleFolder | None:
        """The images that generate.py made with the newest state outside a sweep, if any."""
        found = sorted(((float(name.kimg), entry.path) for entry in os.scandir(self.path)
                        if entry.is_dir() and (name := _images_name(entry.name))), reverse=True)
        for kimg, folder in found:
            paths = {int(path.stem): path for pattern in ("*.png", "[0-9]*/*.png")
                     for path in Path(folder).glob(pattern) if re.fullmatch(r"\d{1,18}", path.stem)}
            if paths:
                settings = read_json(Path(folder, GENERATE_RECORD))
                steps = (("num_steps", str(settings.get("num_steps"))),)
                return SampleFolder(kimg, steps + _other_settings(settings), paths)
        return None

    def column(self, name: str) -> list[tuple[float, float]]:
        """Returns (kimg, value) of the ticks that have the value."""
        return [(tick["kimg"], tick[name]) for tick in self.ticks if name in tick]


def read_scores(run_dir: str | os.PathLike, D: float | None = None,
                notes: list[str] | None = None) -> list[Score]:
    """Returns the scores in metrics.jsonl of a run; if it is damaged, `notes` get a line.

    `D` is used for scores that do not record it.
    """
    lines = _json_lines(Path(run_dir, SCORES_FILE), [] if notes is None else notes, required=False)
    return [score for line in lines if (score := _score(line, D))]


def _dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """Returns a finite number as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _dimensions(value: Any) -> float | None:
    """Returns a D as a float; None for anything that can't be one."""
    number = math.inf if value == "inf" else _number(value)
    return number if number is not None and number > 0 else None


def read_json(path: Path) -> dict:
    """Returns the JSON object in a file, {} if there is none."""
    try:
        return _dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}


def _json_lines(path: Path, notes: list[str], *, required: bool = True) -> list[dict]:
    """Returns the JSON objects in a file, one per line; `notes` count the other lines."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        if required or path.exists():
            notes.append(f"{path.name} can't be read: {error.strerror}")
        return []
    records, lines = [], list(filter(str.strip, text.split("\n")))
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(value := json.loads(line), dict):
                records.append(value)
    if bad := len(lines) - len(records):
        notes.append(f"{path.name}: {bad} line{'s' if bad > 1 else ''} ignored, not JSON objects "
                     "(a killed run may leave half a line)")
    if required and not records:
        notes.append(f"{path.name} holds no ticks")
    return records


def _mean(line: dict, key: str) -> float | None:
    return _number(_dict(line.get(key)).get("mean"))


def _ticks(lines: Iterable[dict]) -> list[dict[str, float]]:
    """Returns the values of each tick by rising kimg; repeated ones replace earlier ones."""
    ticks: list[dict[str, float]] = []
    for line in lines:
        tick = {name: value for name, key in _TICK_KEYS.items()
                if (value := _mean(line, key)) is not None}
        if "kimg" not in tick:
            continue
        if sec_per_kimg := _mean(line, "Timing/sec_per_kimg"):
            tick["images_per_sec"] = 1e3 / sec_per_kimg
        while ticks and ticks[-1]["kimg"] >= tick["kimg"]:
            ticks.pop()
        ticks.append(tick)
    return ticks


def _scores_of_stats(lines: Iterable[dict], D: float | None, detector: str) -> list[Score]:
    """Returns the scores of a detector in stats.jsonl, the last one of each kimg."""
    found = {}
    for line in lines:
        kimg = _mean(line, _TICK_KEYS["kimg"])
        for key in line:
            value = _mean(line, key) if key.startswith(_SCORE_PREFIX) else None
            if value is not None and kimg is not None:
                name = key.removeprefix(_SCORE_PREFIX)
                if name.endswith("_frechet_distance"):  # old names began with the detector
                    name = "frechet_distance"
                features = "" if name in OF_PAIRS else detector
                found[name, kimg] = Score(name, value, kimg, D, detector=features)
    return list(found.values())


def _score(line: dict, D: float | None) -> Score | None:
    """Returns the score in a line of metrics.jsonl; None if it has none."""
    value, metric = _number(line.get("value")), line.get("metric")
    if value is None or not isinstance(metric, str):
        return None
    sampler = _dict(line.get("sampler"))
    source = Path(str(line.get("network") or line.get("images") or "")).name
    kimg = _number(line.get("kimg"))
    text = {key: str(line.get(key) or "") for key in ("seeds", "detector", "reference",
                                                      "reference_sha256")}
    return Score(
        metric=metric, value=value, kimg=_kimg_of(source) if kimg is None else kimg,
        D=_dimensions(sampler.get("D")) or D, num=_whole(line.get("num")),
        num_steps=_whole(sampler.get("num_steps")),
        noise_alpha=_number(sampler.get("noise_alpha")) or 0.0,
        bits=_whole(sampler.get("bits")) or FULL_BITS,
        rounding_seed=_whole(sampler.get("rounding_seed")),
        weights=str(sampler.get("weights") or ""),
        nfe=_whole(line.get("nfe") or sampler.get("nfe")),
        network=source if line.get("network") else "",
        other=_other_settings(sampler) + _pair_settings(line) + _class_setting(line)
        + _metric_setting(line), **text)


def _kimg_of(source: str) -> float | None:
    """Returns the number in the name of a network or of a folder of its images."""
    folder = FolderName.parse(source)
    text = folder.kimg if folder else kimg_of_network(source)
    return None if text is None else float(text)


def _images_name(name: str) -> FolderName | None:
    """Returns the parts of the name of a folder of the first seed range, outside sweeps.

    Folders of images that are only for the report have the prefix `REPORT_PREFIX`.
    """
    found = FolderName.parse(name.removeprefix(REPORT_PREFIX))
    return found if found and found.gen_seed == 1 and not found.swept else None


def _other_settings(sampler: dict) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, str(value)) for name, value in sampler.items()
                        if name not in _NOT_COMPARED and value is not None
                        and (name, value) not in SAMPLER_DEFAULTS))


def _pair_settings(line: dict) -> tuple[tuple[str, str], ...]:
    """Returns the range and other settings to which the scores of image pairs are relative."""
    ends, found = line.get("range"), []
    if isinstance(ends, list) and len(ends) == 2 and None not in map(_number, ends):
        found.append(("range", f"{ends[0]:g} to {ends[1]:g}"))
    return tuple(found + [("clip", "True")] * (line.get("clip") is True))


def _class_setting(line: dict) -> tuple[tuple[str, str], ...]:
    """Returns the class of a per-class score, or 'mean', as a setting."""
    of_class = line.get("of_class")
    return () if of_class is None else ((_OF_CLASS, str(of_class)),)


def _metric_setting(line: dict) -> tuple[tuple[str, str], ...]:
    """Returns the file of a plugin's metric, as a setting."""
    return ((OF_PLUGIN[1], str(line["plugin"])),) if line.get("plugin") else ()


def _D_of(options: dict) -> float | None:
    if not isinstance(options.get("pfgmpp"), bool):
        return None
    return _dimensions(options.get("aug_dim")) if options["pfgmpp"] else math.inf


def _settings(record: dict, D: float | None, log: Path) -> dict[str, str]:
    """Returns the settings of training_options.json that a report shows, by title."""
    options, data, network, where = (
        collections.defaultdict(lambda: None, _dict(record.get(key)))
        for key in ("options", "dataset", "network", "provenance"))
    shape = data["image_shape"]
    rows = {
        "D": None if D is None else f"{D:g}", "preset": options["preset"],
        "method": options["method"], "teacher": options["teacher"],
        **({} if options["teacher"] else {"architecture": options["arch"],
                                          "preconditioning": options["precond"]}),
        "parameters": _parameters(log),
        "channels": network["model_channels"], "channels per level": network["channel_mult"],
        "blocks per level": network["num_blocks"], "data": options["data"],
        "images": data["size"],
        "image shape": "x".join(map(str, shape)) if isinstance(shape, list) else None,
        "patches": options["patch"] and f"{options['patch']}x{options['patch']}, "
                   f"{options['patches']} per image",
        "label dimensions": data["label_dim"], "length, Mimg": options["duration"],
        "batch": options["batch"], "learning rate": options["lr"],
        "learning rate ramp, Mimg": options["lr_rampup"], "EMA half-life, Mimg": options["ema"],
        "dropout": options["dropout"], "augmentation": options["augment"],
        "mirrored copy": options["xflip"], "stable targets": options["stf"],
        "precision": options["precision"], "seed": options["seed"],
        "transferred from": options["transfer"], "device": where["device_name"] or where["device"],
        "processes": where["world_size"], "PyTorch": where["torch"], "CUDA": where["cuda"],
        "Python": where["python"], "NumPy": where["numpy"], "commit": where["commit"],
        "started": where["started"],
    }
    return {title: _text(value) for title, value in rows.items() if value not in (None, "")}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value)


def _parameters(log: Path) -> str | None:
    """Returns the number of parameters in the last line of the log's table."""
    try:
        found = _TOTAL_LINE.search(log.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found[1] if found else None
