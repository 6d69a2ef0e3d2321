"""Scores of each class, against scores of the images of that class alone."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from metrics.detectors import Pixels
from metrics.distances import density_coverage, frechet_distance, kernel_distance, precision_recall
from metrics.metrics import METRICS
from metrics.per_class import (
    _LEAST,
    classes_to_score,
    feature_set,
    mean_over_classes,
    scores_by_class,
)
from metrics.statistics import ClassStatistics
from reports.comparison import ScoreGroup, compare, over_kimg
from reports.run_record import RunRecord

CLASSES, REAL = np.array([2, 0, 2, 5] * 12), np.array([5, 2, 0, 0, 7] * 14)


class Classifying(Pixels):
    """Pixels with classes."""

    def logits(self, features):
        return features[:, :3] * 2


def features(classes, seed):
    noise = np.random.default_rng(seed).standard_normal([len(classes), 6])
    return torch.from_numpy(noise + 3 * classes[:, None]).float()


def test_scores_of_a_class_are_those_of_its_images_alone():
    x, y = features(CLASSES, 0), features(REAL, 1)
    scores = scores_by_class(x, CLASSES, y, REAL, Classifying(), ["fid", "kid", "pr", "dc", "is"])
    assert list(scores) == [0, 2, 5]
    for k, found in scores.items():
        own, real = x[k == CLASSES], y[k == REAL]
        moments = [f(part.double().T) for part in (own, real)
                   for f in (lambda v: v.mean(1), torch.cov)]
        assert found["fid"] == pytest.approx(frechet_distance(*moments), rel=1e-9)
        assert (found["kid"], found["kid_std"]) == kernel_distance(own, real)
        assert (found["precision"], found["recall"]) == precision_recall(own, real)
        assert (found["density"], found["coverage"]) == density_coverage(own, real)
        classes = ClassStatistics(len(own))
        classes.append(own[:, :3] * 2, range(len(own)))
        assert found["is"] == pytest.approx(classes.score()[0])


def test_images_of_the_wrong_class_raise_the_scores_of_classes_but_not_that_of_all():
    x, y = features(REAL, 0), features(REAL, 1)
    swapped = np.where(REAL == 0, 2, np.where(REAL == 2, 0, REAL))
    right, wrong = (mean_over_classes(scores_by_class(x, classes, y, REAL, Pixels(), ["fid"]))
                    for classes in (REAL, swapped))
    assert wrong["fid"] > 10 * right["fid"]


def test_the_mean_counts_each_class_once():
    assert mean_over_classes({3: {"fid": 1.0, "kid": 4.0}, 8: {"fid": 2.0, "kid": 0.0}}) == {
        "fid": 1.5, "kid": 2.0}


def test_classes_with_too_few_images_on_either_side_are_told_apart():
    own, real = [0] * 4 + [1] * 3 + [2] * 9, [0] * 4 + [1] * 9 + [3] * 9 + [2] * 3
    assert classes_to_score(own, real, "pr") == ([0], [1, 2, 3])
    assert classes_to_score(own, real, "fid") == ([0, 1, 2], [3])
    with pytest.raises(ValueError, match="no class has 6 generated and 6 real images, which dc"):
        classes_to_score(own, real, "dc")


@pytest.mark.parametrize("name", METRICS)
def test_as_many_images_as_a_metric_needs_are_enough_and_one_less_is_not(name):
    least = _LEAST[name]
    x = features(np.zeros(least, int), 0)
    classes = np.zeros(least, int)
    scores = scores_by_class(x, classes, x.flip(0), classes, Classifying(), [name])
    assert np.isfinite(list(scores[0].values())).all()
    if name not in ("is", "ca"):  # which are defined for a single image
        with pytest.raises(ValueError, match="needed"):
            METRICS[name].compute(feature_set(x[1:], Pixels(), [name]), type(
                "Few", (), {"features": x[1:], "mu": np.zeros(6), "sigma": np.eye(6)}))


def test_classes_of_another_number_of_images_are_refused():
    with pytest.raises(ValueError, match="47 classes were given for 48 images"):
        scores_by_class(features(CLASSES, 0), CLASSES[1:], features(REAL, 1), REAL, Pixels(),
                        ["fid"])


def test_reports_compare_the_mean_over_classes_by_itself_and_no_score_of_one_class(tmp_path):
    lines = [{"metric": "fid", "value": value, "num": 50, "kimg": 5, "of_class": k}
             for k, value in ((None, 2.0), (0, 3.0), (1, 5.0), ("mean", 4.0))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    run = RunRecord.read(tmp_path)
    assert len({ScoreGroup.of(score) for score in run.scores}) == 4
    assert sorted(comparison.over_D[0].points[2].values for comparison in compare(
        [dataclasses.replace(run, scores=[dataclasses.replace(one, D=2) for one in run.scores])]
    )) == [(2.0,), (4.0,)]
    assert [points[5].values for _, _, points in over_kimg(run)] == [(2.0,), (4.0,)]
