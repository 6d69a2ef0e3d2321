"""How scores are reported: one JSON line each as they come, and a table at the end.

    {"metric": "fid", "value": 1.91, "images": ..., "num": 50000, "detector": "inception", ...}

Names are those of metrics/score_names.py.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib.atomic import append_line
from dnnlib.util import format_table, json_value
from metrics.evaluator import Evaluator
from metrics.score_names import LOWER_IS_BETTER, recorded_name, title


@dataclass(frozen=True)
class Score:
    """The values of one set of images: `group` holds the seed ranges of one network together."""

    label: str
    group: str
    values: dict[str, float]


class ScoreLog:
    """The scores of one evaluator, with JSON lines appended to the file `path` if there is one."""

    def __init__(self, evaluator: Evaluator, path: Path | None):
        self._detector, self._reference, self._path = evaluator.detector, evaluator.record, path
        self._scores: list[Score] = []

    @property
    def distance_name(self) -> str:
        """What a Frechet distance of these features is called."""
        return self._detector.distance_name

    @property
    def has_more_than_one_value(self) -> bool:
        """Whether a table would say more than the one Frechet distance."""
        return len(self._scores) > 1 or any(set(s.values) != {"fid"} for s in self._scores)

    def add(self, score: Score, details: dict[str, Any]) -> None:
        """Takes the scores of one set of images; `details` go into its JSON lines."""
        self._scores.append(score)
        facts = {**details, "detector": self._detector.name,
                 "detector_sha256": self._detector.weights_sha256, **self._reference,
                 "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        lines = [json.dumps(json_value({"metric": recorded_name(name, self._detector.name),
                                        "value": value, **facts}))
                 for name, value in score.values.items()]
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self._path, "\n".join(lines))
        except OSError as error:
            print(f"Warning: {self._path} not written: {error}", file=sys.stderr)

    def table(self) -> str:
        """Returns all scores as text, with the lowest and the mean of each group of several."""
        columns = [name for name in self._scores[0].values if not name.endswith("_std")]
        rows = [["images", *map(self._title, columns)]]
        groups: dict[str, list[Score]] = {}
        for score in self._scores:
            groups.setdefault(score.group, []).append(score)
        for scores in groups.values():
            rows += [[score.label, *(_cell(score.values, name) for name in columns)]
                     for score in scores]
            if len(scores) > 1:
                rows += _summaries(scores, columns)
        return format_table(rows)

    def _title(self, name: str) -> str:
        return title(recorded_name(name, self._detector.name), self._detector.name)


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
