"""Nearest training images: scikit-learn and scipy, known copies, the command and its files."""

import csv
import json
import math
import re
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from scipy import stats
from scripts import run_script
from sklearn.neighbors import NearestNeighbors
from tiny import write_dataset

import fid
from images.grid import image_grid
from metrics import nearest
from metrics.nearest import (
    HeldOut,
    Nearness,
    Neighbours,
    copy_distance,
    nearest_neighbours,
    nearness,
)
from metrics.nearest_files import warnings
from reports.run_record import read_scores

PIXELS = ["--detector=pixels", "--device=cpu", "--workers=0"]


def draw(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


# -------------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("rows, columns, differences", [(1024, 16384, 1 << 24), (7, 11, 100)])
@pytest.mark.parametrize("k", [1, 3])
def test_neighbours_are_those_of_scikit_learn(monkeypatch, rows, columns, differences, k):
    for name, value in (("_ROWS", rows), ("_COLUMNS", columns), ("_DIFFERENCES", differences)):
        monkeypatch.setattr(nearest, name, value)
    x, y = draw(0, 30, 5) + 8, draw(1, 50, 5) + 8
    found = nearest_neighbours(x, y, k)
    distances, numbers = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(
        y.double().numpy()).kneighbors(x.double().numpy())
    np.testing.assert_array_equal(found.numbers, numbers)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 3])
def test_copies_are_at_distance_zero_and_near_copies_in_order_far_from_the_origin(k):
    """In float32 |a|^2 + |b|^2 - 2 ab of such features would be off by more than the distances."""
    x = draw(0, 40, 64) * 100
    found = nearest_neighbours(x, torch.cat([x - 2e-4, x, x + 1e-4]), k)
    assert (found.distances[:, 0] == 0).all()
    np.testing.assert_array_equal(
        found.numbers, np.arange(40)[:, None] + np.array([40, 80, 0])[:k])


def test_of_equal_training_images_the_first_is_the_nearest():
    y = draw(0, 20, 4)
    y[[5, 12, 17]] = y[2].clone()
    assert nearest_neighbours(y[2:3], y, 4).numbers.tolist() == [[2, 5, 12, 17]]


@pytest.mark.parametrize("x, y, words", [
    ((2, 3), (9, 4), "3 features can't be compared with 4"),
    ((2, 3), (1, 3), "1 training images: at least 2 needed")])
def test_what_has_no_neighbours_is_refused(x, y, words):
    with pytest.raises(ValueError, match=words):
        nearest_neighbours(torch.zeros(x), torch.zeros(y), 2)


# ----------------------------------------------------------------------------------- nearness


def neighbours(*distances):
    return Neighbours(np.zeros([len(distances), 2], np.int64), np.array(distances, float))


def test_memorised_is_what_is_three_times_nearer_to_one_than_to_any_other_or_a_copy():
    found = nearness(neighbours((0, 0), (0.001, 9), (1, 3.1), (1, 2.9), (5, 6)), up_to=0.01)
    assert (found.copies, found.memorised, found.median) == (2, 3 / 5, 1)


def test_a_copy_is_nearer_than_a_level_of_a_pixel_and_further_than_rounding():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(
        0, 256, [20, 3 * 64 * 64])).float() / 127.5 - 1
    up_to = copy_distance(pixels)
    assert up_to < 1 / 127.5
    rounded = pixels * (1 + 1e-6 * draw(0, *pixels.shape))
    assert (rounded - pixels).norm(dim=1).max() < up_to


@pytest.mark.parametrize("m, h, ties", [(40, 60, False), (300, 25, True)])
def test_c_t_is_the_rank_statistic_of_mann_and_whitney(m, h, ties):
    rng = np.random.default_rng(0)
    own, usual = rng.gamma(2, 1, m) * 0.8, rng.gamma(2, 1, h)
    if ties:
        own, usual = own.round(1), usual.round(1)
    found = nearness(neighbours(*((d, 9) for d in own)), 0, neighbours(*((d, 9) for d in usual)))
    u = stats.mannwhitneyu(own, usual).statistic
    expected = (u - m * h / 2) / math.sqrt(m * h * (m + h + 1) / 12)
    assert found.held_out.c_t == pytest.approx(expected, rel=1e-9)
    assert found.held_out.nearer == (own <= np.quantile(usual, 0.05)).mean()
    assert found.held_out.median == np.median(usual)


@pytest.mark.long
def test_without_memorisation_5_percent_are_nearer_and_c_t_is_standard_normal():
    """Over 200 worlds of one law: means within 4 standard errors."""
    shares, statistics = [], []
    for i in range(200):
        train, own, held = draw(3 * i, 100, 3), draw(3 * i + 1, 50, 3), draw(3 * i + 2, 400, 3)
        found = nearness(nearest_neighbours(own, train, 2), 0, nearest_neighbours(held, train, 1))
        shares.append(found.held_out.nearer)
        statistics.append(found.held_out.c_t)
    assert abs(np.mean(shares) - 0.05) < 4 * np.std(shares) / math.sqrt(200)
    assert abs(np.mean(statistics)) < 4 / math.sqrt(200)
    assert 0.8 < np.std(statistics) < 1.25


def test_a_few_near_copies_show_in_the_share_and_many_in_c_t():
    train, own, held = draw(0, 400, 8), draw(1, 200, 8), draw(2, 400, 8)

    def with_replicas(count):
        copied = torch.cat([train[:count] + 0.01 * draw(3, count, 8), own[count:]])
        return nearness(nearest_neighbours(copied, train, 2), copy_distance(train),
                        nearest_neighbours(held, train, 1))

    few, many = with_replicas(20), with_replicas(150)
    assert few.copies == 0 and few.memorised == pytest.approx(0.1, abs=0.01)
    assert few.held_out.nearer > 0.12 and few.held_out.c_t > -3 > many.held_out.c_t
    blurred = nearness(nearest_neighbours(own * 4, train, 2), 0, nearest_neighbours(held, train, 1))
    assert blurred.held_out.c_t > 3


def test_doubtful_held_out_images_are_warned_of():
    held = HeldOut(num=50, median=1, copies=2, nearer=0, c_t=0)
    texts = warnings(Nearness(9, 1, 0, 0, held))
    assert "2 of 50 images of --held-out are copies" in texts[0] and "50 images" in texts[1]
    assert not warnings(Nearness(9, 1, 0, 0, HeldOut(100, 1, 0, 0, 0)))
    assert not warnings(Nearness(9, 1, 0, 0))


# -------------------------------------------------------------------------------- the command


def images_of(seed, num):
    return np.random.default_rng(seed).integers(0, 256, [num, 8, 8, 3], np.uint8)


def write_images(folder, pixels):
    folder.mkdir(parents=True)
    for i, image in enumerate(pixels):
        PIL.Image.fromarray(image).save(folder / f"{i:06d}.png")


@pytest.fixture
def world(tmp_path):
    """Training, held-out and generated images, of which 4 is training image 7, and 9 nearly 2."""
    train, own = images_of(0, 40), images_of(1, 20)
    own[4], own[9] = train[7], train[2]
    own[9, 0, 0] ^= 31
    write_images(tmp_path / "train", train)
    write_images(tmp_path / "held", images_of(2, 30))
    write_images(tmp_path / "own", own)
    return tmp_path


def call(capsys, *args):
    capsys.readouterr()
    fid.main(["nearest", *map(str, args), *PIXELS], standalone_mode=False)
    return capsys.readouterr()


def flat(pixels):
    return (pixels.astype(np.float64) / 127.5 - 1).transpose(0, 3, 1, 2).reshape(len(pixels), -1)


def test_the_command_finds_copies_and_writes_table_picture_and_lines(world, capsys):
    out, err = call(capsys, f"--images={world / 'own'}", f"--data={world / 'train'}",
                    f"--held-out={world / 'held'}", "--rows=3")
    first, second, files = out.strip().splitlines()
    assert re.fullmatch(r"nearest: median distance [\d.]+ \(20 images\), 1 exact copy, 10\.00% "
                        r"memorised \(nearest under 1/3 of the second\)", first)
    assert re.fullmatch(r"held-out: median distance [\d.]+ \(30 images\); 1\d\.00% of the images "
                        r"are nearer than 5% of these, C_T [+-]\d\.\d\d", second)
    assert "--held-out has 30 images" in err
    folder = world / "nearest_own"
    assert files == f"Files      {folder / 'nearest.csv'}, nearest.png"
    rows = list(csv.DictReader((folder / "nearest.csv").open()))
    own = flat(np.stack([np.asarray(PIL.Image.open(p)) for p in sorted((world / "own").iterdir())
                         if p.suffix == ".png"]))
    gaps = np.linalg.norm(own[:, None] - flat(images_of(0, 40))[None], axis=2)
    for row, own_gaps in zip(rows, gaps, strict=True):
        order = np.argsort(own_gaps)[:2]
        assert [row["nearest"], row["second"]] == [f"{j:06d}.png" for j in order]
        assert [float(row["distance"]), float(row["second_distance"])] == pytest.approx(
            own_gaps[order], rel=1e-5, abs=1e-9)
    assert [rows[i]["nearest"] for i in (4, 9)] == ["000007.png", "000002.png"]
    lines = [json.loads(line) for line in (world / "own/metrics.jsonl").read_text().splitlines()]
    found = {line["metric"]: line for line in lines}
    assert list(found) == ["nearest_distance", "copies", "memorised", "nearer_than_held_out", "c_t"]
    assert found["nearest_distance"]["value"] == pytest.approx(np.median(gaps.min(1)), rel=1e-5)
    assert found["copies"]["value"] == 1 and found["memorised"]["value"] == 0.1
    assert all(line["num"] == 20 and line["detector"] == "pixels" and line["reference_num"] == 40
               and line["reference"] == str(world / "train") for line in lines)
    assert {score.metric for score in read_scores(world / "own")} == set(found)  # of reports


def test_the_picture_has_the_nearest_of_all_first_and_beside_them_what_they_repeat(world, capsys):
    call(capsys, f"--images={world / 'own'}", f"--data={world / 'train'}", "--rows=2",
         f"--out={world / 'out'}")
    picture = np.asarray(PIL.Image.open(world / "out/nearest.png")).astype(int)
    assert (world / "out/metrics.jsonl").exists() and not (world / "own/metrics.jsonl").exists()
    own, train = images_of(1, 20), images_of(0, 40)
    own[9] = train[2]
    own[9, 0, 0] ^= 31

    def places(image):
        """Where the image stands, enlarged to 96 pixels."""
        large = image.repeat(12, 0).repeat(12, 1)
        corners = np.argwhere((picture[:-95, :-95] == large[0, 0]).all(2)).tolist()
        return [(y, x) for y, x in corners if (picture[y:y + 96, x:x + 96] == large).all()]

    (y1, x1), (y2, x2) = places(train[7])  # the copy and what it is a copy of
    assert y1 == y2 and x1 < x2
    [(below, left)], [(beside, right)] = places(own[9]), places(train[2])
    assert below == beside > y1 + 96 and (left, right) == (x1, x2)


def test_captions_stand_under_images_that_stay_as_they_are():
    image = np.full([3, 64, 64], 128, np.uint8)
    plain = np.asarray(image_grid([[image, image], [image, image]]))
    texts = [["a", "0"], ["b", "12.5"]]
    captioned = np.asarray(image_grid([[image, image], [image, image]], captions=texts))
    assert captioned.shape[0] > plain.shape[0] and captioned.shape[1] == plain.shape[1]
    gray = (captioned == 128).all(2)
    assert (gray[:66] == (plain == 128).all(2)[:66]).all()
    second = np.flatnonzero(gray[66:].sum(1) > 100)[0] + 66
    for left in (0, 66):
        assert (captioned[66:second, left:left + 66] < 100).any()  # ink between the rows
        assert (captioned[second + 64:, left:left + 66] < 100).any()


def test_copies_among_held_out_images_are_warned_of(world, capsys):
    for i in (3, 5):
        shutil.copy(world / f"train/{i:06d}.png", world / f"held/{i:06d}.png")
    _, err = call(capsys, f"--images={world / 'own'}", f"--data={world / 'train'}",
                  f"--held-out={world / 'held'}")
    assert "2 of 30 images of --held-out are copies of training images" in err


def test_a_zip_has_its_summary_printed_and_files_only_with_out(world, capsys):
    shutil.make_archive(world / "own", "zip", world / "own")
    before = sorted(world.iterdir())
    args = [f"--images={world / 'own.zip'}", f"--data={world / 'train'}"]
    out, _ = call(capsys, *args)
    assert "1 exact copy" in out and "none, because --images is a file" in out
    assert sorted(world.iterdir()) == before
    assert (world / "x/nearest.csv") not in before
    call(capsys, *args, f"--out={world / 'x'}")
    assert {p.name for p in (world / "x").iterdir()} == {"nearest.csv", "nearest.png",
                                                         "metrics.jsonl"}


def test_what_can_not_be_compared_is_one_line(world, capsys):
    def refused(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            fid.main(["nearest", *map(str, args), *PIXELS])
        out, err = capsys.readouterr()
        assert caught.value.code == 1 and out == "" and err.count("\n") == 1, err
        return err

    own, train = f"--images={world / 'own'}", f"--data={world / 'train'}"
    small = write_dataset(world / "small.zip", side=4)
    gray = write_dataset(world / "gray.zip", channels=1)
    write_images(world / "one", images_of(5, 1))
    assert re.search(r"train: its images are 8x8, but those of .*small.zip are 4x4",
                     refused(f"--images={small}", train))
    assert re.search(r"gray.zip: images have 1 channels, but those of .*train have 3",
                     refused(own, train, f"--held-out={gray}"))
    assert re.search(r"one: 1 image, at least 2 needed", refused(own, f"--data={world / 'one'}"))
    assert "is inside" in refused(own, train, f"--out={world / 'train/x'}")
    assert re.search("nowhere", refused(own, f"--data={world / 'nowhere'}"))
    assert not (world / "nearest_own").exists()


@pytest.mark.scripts
@pytest.mark.slow
def test_two_processes_find_what_one_finds(world, capsys):
    args = [f"--images={world / 'own'}", f"--data={world / 'train'}",
            f"--held-out={world / 'held'}"]
    call(capsys, *args, f"--out={world / 'one'}")
    run_script("fid.py", "nearest", *args, f"--out={world / 'two'}", *PIXELS, processes=2)
    assert (world / "one/nearest.csv").read_text() == (world / "two/nearest.csv").read_text()
