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
    """Returns numbers by which things and others, as many, may belong together; None for none.

    They are unique on either side, and at least half of them are on both. All numbers of a name are
    taken before a single one, and single ones from the last to the first; those that are the same
    on both sides are taken before others.

    Args:
        own: the numbers in the name of each thing.
        others: likewise.
    """
    columns = range(-1, -1 - min(map(len, (*own, *others))), -1)
    ways = [(list(own), list(others)), *(
        ([numbers[i] for numbers in own], [numbers[i] for numbers in others]) for i in columns)]
    ways = [way for way in ways if all(len(set(side)) == len(side) for side in way)
            and 2 * len(set(way[0]) & set(way[1])) >= len(way[0])]
    return next((way for way in ways if set(way[0]) == set(way[1])), ways[0] if ways else None)


def distance_mm(image: Header | None, other: Header | None) -> float | None:
    """Returns how far apart two slices are along the normal of the first; None if unknown."""
    if not (image and other and image.position and other.position):
        return None
    directions = image.directions or other.directions
    if not directions:
        return None
    normal = np.cross(directions[:3], directions[3:])
    return abs(float(normal @ np.subtract(image.position, other.position)))
