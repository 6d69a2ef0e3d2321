"""Scores of each class separately, from kept features and the classes of the images.

A score of class c compares generated images of c with real ones of c. The mean of the distances
over classes is the intra-FID of Miyato and Koyama 2018 (arXiv 1802.05637). Unlike the FID of all
images, it rises if images show another class than they should. Each distance uses fewer images than
the FID of all and so is biased further upwards. Compare only at equal numbers in each class.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from metrics.detectors import Detector
from metrics.distances import NUM_DENSITY_NEIGHBOURS, NUM_NEIGHBOURS
from metrics.metrics import METRICS, FeatureSet
from metrics.references import Reference

# Images that a metric needs on each side.
_LEAST = {"fid": 2, "kid": 2, "pr": NUM_NEIGHBOURS + 1, "dc": NUM_DENSITY_NEIGHBOURS + 1, "is": 2,
          "ca": 2}


def classes_to_score(classes: Sequence[int], reference_classes: Sequence[int],
                     metric: str) -> tuple[list[int], list[int]]:
    """Returns the classes that have enough images on both sides, and the others, each sorted.

    Args:
        classes: classes of the generated images, [m].
        reference_classes: classes of the real images, [n].
        metric: the metric, which decides how many images are enough.

    Raises:
        ValueError: no class has enough.
    """
    least = _LEAST.get(metric, 2)
    own, real = (Counter(np.asarray(side).tolist()) for side in (classes, reference_classes))
    everywhere = sorted(own | real)
    enough = [k for k in everywhere if min(own[k], real[k]) >= least]
    if not enough:
        raise ValueError(f"--per-class: no class has {least} generated and {least} real images, "
                         f"which {metric} needs")
    return enough, [k for k in everywhere if k not in enough]


def scores_by_class(features: torch.Tensor, classes: Sequence[int],
                    reference_features: torch.Tensor, reference_classes: Sequence[int],
                    detector: Detector, metrics: Sequence[str]) -> dict[int, dict[str, float]]:
    """Returns the values of metrics by name, for each class that has enough images for a metric.

    Which classes these are depends on the metric, see `classes_to_score`.

    Args:
        features: features of the generated images, [m, d].
        classes: their classes, [m].
        reference_features: features of the real images, [n, d].
        reference_classes: their classes, [n].
        detector: the detector that computed the features.
        metrics: names of metrics.

    Raises:
        ValueError: no class has enough images for a metric, or lengths differ.
    """
    sides = (features, np.asarray(classes)), (reference_features, np.asarray(reference_classes))
    for part, numbers in sides:
        if len(part) != len(numbers):
            raise ValueError(f"{len(numbers)} classes were given for {len(part)} images")
    enough = {name: classes_to_score(classes, reference_classes, name)[0] for name in metrics}
    scores: dict[int, dict[str, float]] = {}
    for k in sorted(set().union(*enough.values())):
        own, real = (part[torch.from_numpy(numbers == k)] for part, numbers in sides)
        names = [name for name in metrics if k in enough[name]]
        images = feature_set(own, detector, names, asked=[k] * len(own))
        of_class = _reference(real, detector)
        scores[k] = {}
        for metric in map(METRICS.__getitem__, names):
            scores[k] |= zip(metric.values, metric.compute(images, of_class), strict=True)
    return scores


def mean_over_classes(scores: dict[int, dict[str, float]]) -> dict[str, float]:
    """Returns the mean of each value over the classes that have it, with equal weights."""
    names = dict.fromkeys(name for values in scores.values() for name in values)
    return {name: float(np.mean([values[name] for values in scores.values() if name in values]))
            for name in names}


def feature_set(features: torch.Tensor, detector: Detector, metrics: Iterable[str],
                asked: Sequence[int] | None = None) -> FeatureSet:
    """Returns what metrics need of images with features [n, d], all of which are on this rank.

    For `asked` see `FeatureSet`.
    """
    found = FeatureSet(len(features), detector, metrics, asked=asked)
    found.append_features(features.to(detector.device), range(len(features)))
    found.features = features
    return found


def _reference(features: torch.Tensor, detector: Detector) -> Reference:
    moments = feature_set(features, detector, ["fid"]).moments
    return Reference(moments.mean().cpu().numpy(), moments.cov().cpu().numpy(), detector.name,
                     features, count=len(features))
