"""What tells that two files belong together: numbers in their names, positions of slices.

Numbers are natural numbers: 1 is 01. Where two files are counted by different rules, such as from 0
and from 1, their numbers say nothing, and neither do times and identifiers.
"""

import re
from collections.abc import Sequence

import numpy as np

from images.dicom_files import Header

SAME_POSITION_MM = 0.01  # along the normal: rounding in headers is less, distances of slices more
_DIGITS = re.compile("[0-9]+")


def numbers_of(text: str) -> tuple[int, ...]:
    """Returns the natural numbers in a text, in their order."""
    return tuple(map(int, _DIGITS.findall(text)))


def words_of(text: str) -> tuple[str, ...]:
    """Returns what is between the numbers of a text."""
    return tuple(_DIGITS.split(text))


def common_numbers(own: Sequence[tuple[int, ...]], others: Sequence[tuple[int, ...]]
                   ) -> tuple[list, list] | None:
    """Returns keys by which things and others, as many, may belong together; None for none.

    Keys are unique on either side, and at least half of them are on both. Keys that are the same on
    both sides are taken before others, all numbers of a name before a single one, and single ones
    from the last to the first, counted from the end and then from the beginning.

    Args:
        own: the numbers in the name of each thing.
        others: likewise.
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
    """Returns how far apart two slices are along the normal of the first; None if unknown."""
    if not (image and other and image.position and other.position):
        return None
    directions = image.directions or other.directions
    if not directions:
        return None
    normal = np.cross(directions[:3], directions[3:])
    return abs(float(normal @ np.subtract(image.position, other.position)))
