"""Records of scores: a JSON line for each as soon as it is known, and a table at the end.

    {"metric": "fid", "value": 1.91, "images": ..., "num": 50000, "detector": "inception", ...}

The names are those of metrics/score_names.py. Scores that a file already has are not computed
again.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib.atomic import append_line
from dnnlib.registry import origin_record
from dnnlib.util import format_table, json_value
from metrics.evaluator import Evaluator
from metrics.metrics import METRICS
from metrics.recorded_scores import RecordedScores
from metrics.score_names import LOWER_IS_BETTER, recorded_name, title


@dataclass(frozen=True)
class Score:
    """The values of one set of images; the seed ranges of one network share a `group`."""

    label: str
    group: str
    values: dict[str, float]


class ScoreLog:
    """The scores of one evaluator, and the files that record them."""

    def __init__(self, evaluator: Evaluator):
        self._detector, self._reference = evaluator.detector, evaluator.record
        self._scores: list[Score] = []
        self._recorded: dict[Path, RecordedScores] = {}  # contents of files read so far

    @property
    def distance_name(self) -> str:
        """The name of a Frechet distance between these features."""
        return self._detector.distance_name

    @property
    def has_more_than_one_value(self) -> bool:
        """Whether a table would contain more than a single Frechet distance."""
        return len(self._scores) > 1 or any(set(s.values) != {"fid"} for s in self._scores)

    def add(self, score: Score) -> None:
        """Adds the scores of one set of images to the table."""
        self._scores.append(score)

    def record(self, path: Path | None, values: dict[str, float], details: dict[str, Any],
               **of_value: dict[str, Any]) -> bool:
        """Appends a JSON line per value to a file; returns False if it can't be written.

        `details` go into every line, and the entries of `of_value` into the line of that value.
        With None as the path nothing is written.
        """
        if path is None or not values:
            return True
        date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        records = [json_value({"metric": self._name(name), "value": value, **self._origin(name),
                               **of_value.get(name, {}), **self._facts(details), "date": date})
                   for name, value in values.items()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            append_line(path, "\n".join(map(json.dumps, records)))
        except OSError as error:
            print(f"Warning: {path} not written: {error}", file=sys.stderr)
            return False
        if path in self._recorded:
            for record in records:
                self._recorded[path].add(record)
        return True

    def recorded(self, path: Path | None, names: Sequence[str], details: dict[str, Any],
                 bootstrap: int | None = None) -> dict[str, dict[str, Any]]:
        """Returns the records in a file that match these values, images and the reference.

        Args:
            path: the file, or None.
            names: names of values.
            details: what the record says about the images.
            bootstrap: the number of draws for the interval of fid; None if it needs no interval.
        """
        if path is None:
            return {}
        found = {name: self._in_file(path).find(self._plain(name, details),
                                                bootstrap if name == "fid" else None)
                 for name in names}
        return {name: record for name, record in found.items() if record is not None}

    def recorded_classes(self, path: Path | None, names: Sequence[str], details: dict[str, Any]
                         ) -> dict[int | str, dict[str, float]]:
        """Returns the per-class values, and their means, that a file has."""
        found: dict[int | str, dict[str, float]] = {}
        for name in names if path is not None else ():
            records = self._in_file(path).of_classes(self._plain(name, details))
            for number, record in records.items():
                found.setdefault(number, {})[name] = record["value"]
        return found

    def _in_file(self, path: Path) -> RecordedScores:
        if path not in self._recorded:
            self._recorded[path] = RecordedScores(path)
        return self._recorded[path]

    def _plain(self, name: str, details: dict[str, Any]) -> dict[str, Any]:
        return json_value({"metric": self._name(name), **self._origin(name),
                           **self._facts(details)})

    @staticmethod
    def _origin(value: str) -> dict[str, str]:
        """Returns the plugin file that added a value's metric, if there is one."""
        return origin_record(*((METRICS, name) for name, metric in METRICS.items()
                               if value in metric.values))

    def _facts(self, details: dict[str, Any]) -> dict[str, Any]:
        return {**details, "detector": self._detector.name,
                "detector_sha256": self._detector.weights_sha256, **self._reference}

    def _name(self, value: str) -> str:
        return recorded_name(value, self._detector.name)

    def table(self) -> str:
        """Returns all scores as text, with the lowest and the mean of each group with several."""
        columns = [name for name in self._scores[0].values if not name.endswith("_std")]
        rows = [["images", *map(self.title, columns)]]
        groups: dict[str, list[Score]] = {}
        for score in self._scores:
            groups.setdefault(score.group, []).append(score)
        for scores in groups.values():
            rows += [[score.label, *(_cell(score.values, name) for name in columns)]
                     for score in scores]
            if len(scores) > 1:
                rows += _summaries(scores, columns)
        return format_table(rows)

    def title(self, name: str) -> str:
        """Returns the title of a value of a metric."""
        return title(self._name(name), self._detector.name)


def _cell(values: dict[str, float], name: str) -> str:
    text = f"{values[name]:.5g}"
    return f"{text} ± {values[f'{name}_std']:.2g}" if f"{name}_std" in values else text


def _summaries(scores: list[Score], columns: Sequence[str]) -> list[list[str]]:
    lowest, mean = [f"  lowest of {len(scores)}"], [f"  mean of {len(scores)}"]
    for name in columns:
        values = [score.values[name] for score in scores]
        lowest.append(f"{min(values):.5g}" if name in LOWER_IS_BETTER else "")
        mean.append(f"{sum(values) / len(values):.5g}")
    return [lowest, mean]
