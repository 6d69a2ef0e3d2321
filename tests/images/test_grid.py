"""What the rows of grids are labelled."""

import numpy as np
import pytest
from image_sources import flat

from images import grid

NAMES = ["cat", "\u00e4hre", "\u043a\u043e\u0442", "\u732b", "\u05d7\u05ea\u05d5\u05dc", "a\nb", "",
         "e\u0301tude", "\ud800"]


@pytest.fixture
def with_font(monkeypatch):
    """Makes DejaVu Sans, which matplotlib brings, the only font of the system."""
    matplotlib = pytest.importorskip("matplotlib")
    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    monkeypatch.setattr(grid, "_SYSTEM_FONTS", ("no such font.ttf", path))


def labels():
    return [grid.class_label(number, NAMES) for number in range(len(NAMES) + 1)]


def test_names_beyond_ascii_are_shown_where_a_font_has_their_letters(with_font):
    """DejaVu has Latin and Cyrillic but no Chinese; Hebrew is written from right to left."""
    assert labels() == ["cat", NAMES[1], NAMES[2], "3", "4", "5", "6", "\u00e9tude", "8", "9"]


def test_without_such_a_font_they_are_numbers(monkeypatch):
    monkeypatch.setattr(grid, "_SYSTEM_FONTS", ("no such font.ttf",))
    assert labels() == ["cat", *map(str, range(1, 10))]
    assert grid.class_label(0, None) == "0"


def picture(*texts):
    rows = [[np.repeat(flat(0, size=64)[None], 3, axis=0)] for _ in texts]
    return np.asarray(grid.image_grid(rows, texts))


def test_letters_are_drawn_and_fit(with_font):
    accented, plain = picture("\u00e4hre"), picture("ahre")
    assert (accented != 255).any() and accented.tobytes() != plain.tobytes()
    for text in ("W" * 16, "i" * 16, NAMES[2], "cat"):
        margin = picture(text)[:, :-68]  # beside the image
        dark = np.flatnonzero((margin < 128).any(axis=(0, 2)))
        assert dark[0] > 2 and dark[-1] < margin.shape[1] - 3


def test_rows_of_a_grid_are_named(with_font):
    images = np.zeros([4, 3, 64, 64], np.uint8)
    named = np.asarray(grid.square_grid(images, [1, 0, 1, 0], NAMES))
    numbered = np.asarray(grid.square_grid(images, [1, 0, 1, 0], ["\u732b", "\u732b"]))
    assert named.shape[1] > numbered.shape[1]
    assert np.array_equal(numbered, np.asarray(grid.square_grid(images, [1, 0, 1, 0])))
