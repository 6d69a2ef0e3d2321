"""Scores of many networks, settings and ranges of seeds; none is computed twice."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dnnlib import console
from dnnlib.atomic import check_writable
from dnnlib.cli import describe
from dnnlib.util import format_ranges, is_url
from metrics.detectors import FEATURES_VERSION, Detector
from metrics.feature_files import KeptFeatures, load_on_rank0, of_features
from metrics.recorded_scores import settings_of_images
from metrics.score_names import SCORES_FILE
from metrics.score_report import Job, ScoreReport
from metrics.scoring import network_features
from metrics.unfinished import UnfinishedSums
from sampling.network_sampler import NetworkFile, NetworkSampler, UsageError
from sampling.sweeps import SweepPoint
from torch_utils import distributed as dist
from torch_utils.misc import configure_backends

_SEEDS_AT_ONCE = 256  # seeds whose classes are drawn together
_MAX_NAMED = 4  # networks in a message


def seed_ranges(seeds: Sequence[int], count: int) -> list[list[int]]:
    """Returns `count` ranges of seeds: `seeds`, then equally many that continue its pattern."""
    span = max(seeds) - min(seeds) + 1
    return [[seed + i * span for seed in seeds] for i in range(count)]


def score_networks(
    sources: Sequence[str], points: Sequence[SweepPoint], ranges: Sequence[Sequence[int]],
    open_sampler: Callable[[NetworkFile, SweepPoint], NetworkSampler],
    open_report: Callable[[str, NetworkSampler], ScoreReport], *, batch: int,
    out: Path | None = None, key: str | None = None, again: bool = False,
    features: Path | None = None, needing_classes: str | None = None,
    are_seeds_default: bool = False,
) -> None:
    """Scores every network at every point and range, and reads each file once.

    If a network can't be opened or scored, there is a warning, and the others are scored.

    Args:
        sources: paths or addresses of networks.
        points: settings of the sampler.
        ranges: ranges of seeds; a range has one seed for each image of a score.
        open_sampler: makes a sampler from a file and a setting.
        open_report: makes the report, given the first sampler and its name.
        batch: the maximum number of images at a time on one rank.
        out: the file of scores; None means metrics.jsonl beside each network.
        key: which network to load from files that hold several.
        again: compute scores again that the file already has.
        needing_classes: the flag that needs networks with classes; None if no flag does.
        are_seeds_default: whether the user gave no seeds; means are then made of all inputs.
        features: where the features are kept: a .npz file for a single score, else a folder.

    Raises:
        ValueError: networks were not scored (raised at the end).
        UsageError: the first network can't be scored with these options (raised at once).
        OSError: the only network can't be read, or scores can't be recorded (raised at once if that
            is known in advance, else at the end).
    """
    report, failed = None, {}
    is_single = len(sources) * len(points) * len(ranges) == 1
    labels = dict(zip(sources, _labels(sources), strict=True))
    dist.run_on_rank0(_check_places, sources, out)
    for source in sources:
        try:
            file = NetworkFile.read(source, key)
            for point in points:
                sampler = open_sampler(file, point)
                if needing_classes and sampler.label_kind != "classes":
                    raise UsageError(f"{needing_classes}: {source} has no classes; leave "
                                     f"{needing_classes.split('=')[-1]} out")
                if are_seeds_default and sampler.average > 1:
                    ranges = seed_ranges(range(len(sampler.inputs)), len(ranges))
                for seeds in ranges:
                    sampler.check_seeds(seeds)
                if report is None:
                    report = _opened(open_report, source, sampler)
                else:
                    report.check(sampler, source)
                report.check_asked(sampler.net.label_dim, source)
                for seeds in ranges:
                    job = _Job.of(file, point, sampler, seeds, labels[source], out)
                    kept = features and (features if is_single else features / job.feature_name)
                    _score(job, sampler, seeds, report, batch, again, kept)
        except _NoReportError:
            raise
        except (ValueError, OSError) as error:
            is_of_all = isinstance(error, UsageError) and report is None
            if len(sources) == 1 or is_of_all:
                raise
            failed[source] = error
            dist.warn0(f"{source} is not scored: {error}")
    if report is not None:
        report.print_table()
    if failed:
        named = ", ".join(labels[source] for source in list(failed)[:_MAX_NAMED])
        more = ", ..." if len(failed) > _MAX_NAMED else ""
        raise ValueError(f"{len(failed)} of {len(sources)} networks were not scored, see the "
                         f"warnings above: {named}{more}")
    if report is not None and report.has_lost_scores:
        raise OSError("not all scores could be recorded, see the warnings above")


def _check_places(sources: Sequence[str], out: Path | None) -> None:
    """Raises OSError if scores can't be recorded; warns if there is no file for them."""
    if out is None and any(map(is_url, sources)):
        dist.warn0("scores and unfinished ranges of networks at addresses are not kept; give "
                   "--out=FILE.jsonl to keep them")
    for path in dict.fromkeys(_scores_file(source, out) for source in sources):
        try:
            if path is not None:
                check_writable(path)
        except OSError as error:
            raise OSError(f"{path}: {describe(error)}, so scores can't be recorded; give another "
                          "file as --out") from error


def _scores_file(source: str, out: Path | None) -> Path | None:
    """Returns the file for the scores of a network; None for a network at an address."""
    if out is not None:
        return out
    return None if is_url(source) else Path(source).parent / SCORES_FILE


class _NoReportError(ValueError):
    """An error that prevents all networks from being scored."""


def _opened(open_report: Callable[[str, NetworkSampler], ScoreReport], source: str,
            sampler: NetworkSampler) -> ScoreReport:
    """Returns the report; raises _NoReportError if the detector or reference can't be used."""
    try:
        return open_report(source, sampler)
    except (ValueError, OSError) as error:
        raise _NoReportError(str(error)) from error


class _Job(NamedTuple):
    """One range of seeds of one network at one setting."""

    name: Job
    facts: dict[str, Any]  # contents of its record
    path: Path | None  # the file of its scores
    feature_name: str  # name of its file in a folder of features

    @classmethod
    def of(cls, file: NetworkFile, point: SweepPoint, sampler: NetworkSampler,
           seeds: Sequence[int], label: str, out: Path | None) -> "_Job":
        """Returns the job; `out` is the file of all scores, or None for a file by the network."""
        facts = {"network": file.source, "num": len(seeds), "seeds": format_ranges(seeds),
                 "sampler": sampler.settings}
        shown = [label, *point.suffix.split("_")[1:], "seeds", facts["seeds"]]
        place = Path(os.path.abspath(file.source))
        stem = place.stem if is_url(file.source) else f"{place.parent.name}_{place.stem}"
        name = f"{stem}{point.suffix}_{min(seeds)}-{max(seeds)}_{_digest(facts)[:8]}.npz"
        return cls(Job(file.source, " ".join(filter(None, shown)), file.source + point.suffix),
                   facts, _scores_file(file.source, out), name)


def _digest(facts: dict[str, Any]) -> str:
    """Returns a hash of the facts that determine the images."""
    known = [settings_of_images(facts.get("sampler")), facts.get("seeds"), facts.get("num")]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _score(job: _Job, sampler: NetworkSampler, seeds: Sequence[int], report: ScoreReport,
           batch: int, again: bool, kept_at: Path | None) -> None:
    """Scores one range of one sampler, unless its score is already recorded.

    `kept_at` is the file of its features, which are then loaded if possible; None for no file.
    """
    kept = None if again or kept_at is None else _load_features(kept_at, job, report.detector)
    missing = report.missing(job.name, job.facts, job.path, again=again)
    classes, unfinished = None, None
    if missing and (report.is_per_class or report.needs_asked(missing)):
        classes = dist.run_on_rank0(_classes, sampler, seeds)
    if missing and report.is_per_class:
        report.check_classes(classes)
    if kept is not None and missing:
        dist.print0(f"Features   {job.name.label}: from {kept_at}")
        found = of_features(kept, len(seeds), report.detector, missing,
                            keeps_features=report.keeps_features, asked=classes)
    elif missing or (kept_at is not None and kept is None):
        if not missing:
            dist.print0(f"Features   {job.name.label}: not in {kept_at} yet, so its images are "
                        "sampled again")
        keeps = kept_at is not None or report.keeps_features
        unfinished = UnfinishedSums(job.path and job.path.parent,
                                    _key(job.facts, report))
        configure_backends(sampler.settings["precision"])
        with console.timed("samples and features"):
            found = network_features(sampler, seeds, report.detector, metrics=missing, batch=batch,
                                     title=job.name.label, unfinished=unfinished,
                                     keeps_features=keeps, asked=classes)
        configure_backends("fp32")
    if missing:
        report.add(job.name, found, job.facts, job.path, classes)
    if unfinished is not None:
        if kept_at is not None:
            dist.run_on_rank0(lambda: KeptFeatures(
                found.features, report.detector.name, job.facts, sampler.image_shape, sampler.scale,
                report.detector.weights_sha256).save(kept_at))
        if not report.has_lost_scores:
            unfinished.remove()


def _classes(sampler: NetworkSampler, seeds: Sequence[int]) -> list[int]:
    """Returns the class of the image of each seed."""
    return [number for start in range(0, len(seeds), _SEEDS_AT_ONCE)
            for number in sampler.classes(seeds[start:start + _SEEDS_AT_ONCE])]


def _load_features(path: Path, job: _Job, detector: Detector) -> KeptFeatures | None:
    """Returns the features of a job, or None if the file does not exist.

    Raises:
        ValueError: they belong to other images or to another detector.
    """
    if not dist.run_on_rank0(path.exists):
        return None
    kept, _ = load_on_rank0(path)
    kept.check_made_by(detector, path)
    if _digest(kept.facts) != _digest(job.facts):
        raise ValueError(f"--features={path}: holds features of images with other seeds or "
                         "settings; give another file, or --again to replace it")
    return kept


def _key(facts: dict[str, Any], report: ScoreReport) -> dict[str, Any]:
    """Returns what determines the features of a range."""
    return {"images": _digest(facts),
            "detector": [report.detector.name, report.detector.weights_sha256, FEATURES_VERSION]}


def _labels(sources: Sequence[str]) -> list[str]:
    """Returns labels that distinguish the paths: the parts after their common folder.

    A single path needs no label.
    """
    if len(sources) == 1:
        return [""]
    paths = [source if is_url(source) else os.path.abspath(source) for source in sources]
    folders = {os.path.dirname(path) for path in paths}
    if any(map(is_url, paths)):
        return list(sources)
    shared = os.path.commonpath(folders)
    return [os.path.relpath(path, shared) for path in paths]
