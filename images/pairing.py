"""Evidence that two files belong together: numbers in their names, or positions of slices.

Numbers are compared as natural numbers, so 1 equals 01. If two files are numbered by different
rules, for example from 0 and from 1, their numbers are no evidence. Neither are times and
identifiers.
"""

import re
from collections.abc import Sequence

import numpy as np

from images.dicom_files import Header

SAME_POSITION_MM = 0.01  # along the normal: more than rounding errors, less than slice distances
_DIGITS = re.compile("[0-9]+")


def numbers_of(text: str) -> tuple[int, ...]:
    """Returns the natural numbers in a text, in order."""
    return tuple(map(int, _DIGITS.findall(text)))


def words_of(text: str) -> tuple[str, ...]:
    """Returns the parts of a text between its numbers."""
    return tuple(_DIGITS.split(text))


def common_numbers(own: Sequence[tuple[int, ...]], others: Sequence[tuple[int, ...]]
                   ) -> tuple[list, list] | None:
    """Returns keys by which things match equally many others, or None if there are none.

    Keys are unique on each side, and at least half of them occur on both. Candidates whose keys are
    the same set on both sides come first. Among these, all numbers of a name come before single
    ones, which are tried from the last to the first, counted from the end and then from the start.

    Args:
        own: the numbers in the name of each thing.
        others: the numbers in the name of each other thing.
    """
    least = min(map(len, (*own, *others)))
    columns = [*range(-1, -1 - least, -1), *range(least)]
    ways = [(list(own), list(others)), *(
        ([numbers[i] for numbers in own], [numbers[i] for numbers in others]) for i in columns)]
    ways = [way for way in ways if _may_be_keys(*map(set, way), len(own))]
    return next((way for way in ways if set(way[0]) == set(way[1])), ways[0] if ways else None)


def _may_be_keys(own: set, others: set, count: int) -> bool:
    if len(own) < count or len(others) < count or 2 * len(own & others) < count:
        return False
    from_0, from_1 = set(range(count)), set(range(1, count + 1))
    sides = [{key[-1] if isinstance(key, tuple) else key for key in side} for side in (own, others)]
    return sides not in ([from_0, from_1], [from_1, from_0])


def distance_mm(image: Header | None, other: Header | None) -> float | None:
    """Returns the distance of two slices along the normal of the first, or None if unknown."""
    if not (image and other and image.position and other.position):
        return None
    directions = image.directions or other.directions
    if not directions:
        return None
    normal = np.cross(directions[:3], directions[3:])
    return abs(float(normal @ np.subtract(image.position, other.position)))
