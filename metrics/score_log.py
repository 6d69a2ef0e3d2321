"""How scores are reported: one JSON line each as they come, and a table at the end.

    {"metric": "fid", "value": 1.91, "images": ..., "num": 50000, "detector": "inception", ...}

Names are those of metrics/score_names.py. What a file has already need not be computed again.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib.atomic import append_line
from dnnlib.util import format_table, json_value
from metrics.evaluator import Evaluator
from metrics.score_names import LOWER_IS_BETTER, recorded_name, title

_IDENTITY = ("metric", "num", "seeds", "sampler", "detector", "detector_sha256",
             "reference_sha256", "of_class")


@dataclass(frozen=True)
class Score:
    """The values of one set of images: `group` holds the seed ranges of one network together."""

    label: str
    group: str
    values: dict[str, float]


class ScoreLog:
    """The scores of one evaluator, and the files that have a JSON line for each."""

    def __init__(self, evaluator: Evaluator):
        self._detector, self._reference = evaluator.detector, evaluator.record
        self._scores: list[Score] = []
        self._recorded: dict[Path, dict[str, dict]] = {}  # what files had, by `_identity`

    @property
    def distance_name(self) -> str:
        """What a Frechet distance of these features is called."""
        return self._detector.distance_name

    @property
    def has_more_than_one_value(self) -> bool:
        """Whether a table would say more than the one Frechet distance."""
        return len(self._scores) > 1 or any(set(s.values) != {"fid"} for s in self._scores)

    def add(self, score: Score) -> None:
        """Takes the scores of one set of images into the table."""
        self._scores.append(score)

    def record(self, path: Path | None, values: dict[str, float], details: dict[str, Any],
               **of_value: dict[str, Any]) -> None:
        """Appends a JSON line a value to a file, if there is one.

        `details` go into each, and `of_value` into those of some values, by their names.
        """
        if path is None:
            return
        date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        lines = [json.dumps(json_value({"metric": self._name(name), "value": value,
                                        **of_value.get(name, {}), **self._facts(details),
                                        "date": date}))
                 for name, value in values.items()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            append_line(path, "\n".join(lines))
        except OSError as error:
            print(f"Warning: {path} not written: {error}", file=sys.stderr)

    def recorded(self, path: Path | None, names: Sequence[str], details: dict[str, Any]
                 ) -> dict[str, dict[str, Any]]:
        """Returns the records of those values that a file has, of the same images and reference.

        The images are the same if `details` have the same number, seeds and settings of the
        sampler, of which the hash of the weights is one.
        """
        if path is None:
            return {}
        if path not in self._recorded:
            self._recorded[path] = dict(_read_identities(path))
        there, facts = self._recorded[path], json_value(self._facts(details))
        found = {name: there.get(_identity({"metric": self._name(name), **facts}))
                 for name in names}
        return {name: record for name, record in found.items() if record is not None}

    def _facts(self, details: dict[str, Any]) -> dict[str, Any]:
        return {**details, "detector": self._detector.name,
                "detector_sha256": self._detector.weights_sha256, **self._reference}

    def _name(self, value: str) -> str:
        return recorded_name(value, self._detector.name)

    def table(self) -> str:
        """Returns all scores as text, with the lowest and the mean of each group of several."""
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
        """Returns what readers see for a value of a metric."""
        return title(self._name(name), self._detector.name)


def _read_identities(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the identity and the content of each line of a file that holds a score."""
    try:
        text = path.read_bytes()
    except OSError:
        return
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # damaged: the score is not known
            record = json.loads(line)
            if isinstance(record, dict) and type(record.get("value")) in (int, float):
                yield _identity(record), record


def _identity(record: dict[str, Any]) -> str:
    """Returns what two records have in common that are of the same images and the same measure."""
    return json.dumps([record.get(key) for key in _IDENTITY], sort_keys=True)


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
