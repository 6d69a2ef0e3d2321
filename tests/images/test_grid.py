"""How grids are laid out and labelled."""

import numpy as np
import PIL.Image
import pytest
import torch
from image_sources import flat
from scripts import ROOT

import generate
from images import grid
from sampling.network_sampler import NetworkSampler

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


def tiles(shown, height, width, columns):
    """Returns the gray levels of the images of a picture without labels at its left, by rows."""
    rows = range(34, shown.shape[0], height)
    return [[int(shown[y, 34 + column * width, 0]) for column in range(columns)] for y in rows]


def test_unequal_classes_are_sorted_with_captions_and_leave_no_row_half_empty():
    images = np.stack([np.full([3, 64, 64], 10 * i, np.uint8) for i in range(12)])
    classes = [1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 1, 0]
    shown = np.asarray(grid.square_grid(images, classes, ["cat", "dog", "cow"]))
    height = (shown.shape[0] - 2) // 3
    assert shown.shape[1] == 4 * 66 + 2 and height > 70, "room for the captions"
    assert tiles(shown, height, 66, 4) == [[10, 20, 30, 40], [50, 60, 80, 90], [110, 0, 100, 70]]
    below = [shown[2 + 64 + height * row:height * (row + 1), 66 * 3:66 * 4] for row in range(3)]
    assert all((each < 128).any() for each in below), "each has its caption"
    assert np.array_equal(below[0], below[1]) and not np.array_equal(below[0], below[2])


def test_equal_classes_fill_their_rows():
    images = np.stack([np.full([3, 64, 64], 10 * i, np.uint8) for i in range(24)])
    shown = np.asarray(grid.square_grid(images, [i % 3 for i in range(24)]))
    labels, shown = shown[:, :-(4 * 66 + 2)], shown[:, -(4 * 66 + 2):]
    assert [(labels[y:y + 66] < 100).any() for y in range(0, 6 * 66, 66)] == [True, False] * 3
    assert tiles(shown, 66, 66, 4) == [[10 * (3 * (4 * line + i) + k) for i in range(4)]
                                       for k in range(3) for line in range(2)]


@pytest.mark.parametrize("classes, most, expected", [
    ([0, 0, 1, 0, 1, 1, 0, 0], 8, None),  # all can be shown
    ([0, 0, 1, 0, 1, 1, 0, 0], 7, [0, 1, 2, 3, 4, 5]),
    ([0, 0, 1, 0, 1, 1, 0, 0], 4, [0, 1, 2, 4]),
    ([0, 0, 0, 1, 0, 0, 0, 0, 0], 8, None),  # 2 of 8
    ([3] * 100, 64, list(range(64))),
    ([0, 1] * 40, 27, list(range(24))),  # 12 of 13 each, which make full rows
    (list(range(17)), 16, None),  # too many rows
], ids=str)
def test_equally_many_images_of_each_class_are_chosen_if_few_are_left_out(classes, most, expected):
    assert grid.even_classes(classes, most) == expected


@pytest.mark.parametrize("count, columns", [(100, 6), (16, 4)])
def test_generate_shows_its_own_images_by_class(count, columns, tmp_path, invoke):
    """100 seeds have at least six images of each digit; of 16, all are shown, with captions."""
    network = ROOT / "examples/digits8-8.pt"
    result = invoke(generate.main, f"--network={network}", f"--outdir={tmp_path}", "--steps=1",
                    f"--seeds=0-{count - 1}", "--save_images", "--device=cpu")
    assert result.exit_code == 0, result.output
    shown = "60 of 100" if count == 100 else "16"
    assert f"{tmp_path}/vis: {shown} images by class in grid.png, and how" in result.output
    assert f"{count} images made, as .npy arrays in the units of the data\n" in result.output
    drawn = NetworkSampler.open(str(network), torch.device("cpu"), num_steps=1).classes(
        range(count))
    shown = np.asarray(PIL.Image.open(tmp_path / "vis/grid.png"))[..., 0]
    shown = shown[2:, -(columns * 66):]
    order = sorted(range(count), key=lambda seed: drawn[seed])
    if count == 100:
        order = [seed for k in range(10) for seed in [s for s in order if drawn[s] == k][:columns]]
    height = shown.shape[0] * columns // len(order)
    assert height == 66 or count == 16
    for place, seed in enumerate(order):
        top, left = place // columns * height, place % columns * 66
        tile = shown[top + 4:top + 64:8, left + 4:left + 64:8]
        saved = np.load(tmp_path / f"{seed:06d}.npy")[0]  # 16 is white
        np.testing.assert_allclose(tile, np.clip(saved / 16, 0, 1) * 255, atol=1)


def test_the_halves_have_their_own_titles_above_them():
    rows = [[np.zeros([3, 64, 64], np.uint8)] * 4] * 2
    plain = np.asarray(grid.image_grid(rows, split=2))
    shown = np.asarray(grid.image_grid(rows, split=2, halves=["i", "W" * 8]))
    top = len(shown) - len(plain)
    assert top > 8 and np.array_equal(shown[top:], plain)
    ink = [(part < 128).any(axis=2) for part in np.array_split(shown[:top], 2, axis=1)]
    assert 0 < ink[0].sum() < ink[1].sum() / 8
    centre = np.flatnonzero(ink[0].any(axis=0)).mean()
    assert abs(centre - (2 + 2 * 66 - 2) / 2) < 3
