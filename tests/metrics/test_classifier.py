"""Classifiers of small images and class accuracy: known decisions, scikit-learn, real digits."""

import dataclasses
import io
import itertools
import json
import math
import re
import shutil
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch
from scripts import ROOT, run_script
from snapshots import write_snapshot
from tiny import write_dataset

import dataset_tool
import fid
import generate
from images.dataset import ImageFolderDataset
from metrics import classifier
from metrics.classifier import Perceptron
from metrics.classifier_training import moved_copies, of_model
from metrics.detectors import Classifier, Pixels, build_detector
from metrics.metrics import FeatureSet
from metrics.score_names import title
from metrics.scoring import check_scoring
from metrics.unfinished import UnfinishedSums
from reports.comparison import ScoreGroup
from reports.run_record import read_scores

JUDGE = ROOT / "examples/digits8-judge.npz"
CPU = ["--device=cpu", "--workers=0"]
BRIGHT = 120  # images above are of class 1


def by_brightness(shape=(3, 8, 8), classes=2, scale=None):
    """A classifier that takes images whose mean is above BRIGHT for class 1, others for class 0."""
    numbers = int(np.prod(shape))
    level = BRIGHT / 127.5 - 1
    hidden = torch.full([numbers, 2], 1 / numbers)
    last = torch.zeros(2, classes)
    last[0, 1] = 1.0  # 1 + mean x of class 1, against 1 + level of class 0
    biases = torch.full([classes], -1.0)
    biases[:2] = torch.tensor([1 + level, 0.0])
    return Perceptron((hidden, last), (torch.ones(2), biases), shape, scale)


@pytest.fixture
def judge(tmp_path):
    by_brightness().save(tmp_path / "judge.npz")
    return tmp_path / "judge.npz"


def write_levels(path, levels, labels):
    """Writes a ZIP of flat images of these levels."""
    names = [f"{i:06d}.png" for i in range(len(levels))]
    with zipfile.ZipFile(path, "w") as archive:
        for name, level in zip(names, levels, strict=True):
            buffer = io.BytesIO()
            PIL.Image.new("RGB", (8, 8), (level,) * 3).save(buffer, "PNG")
            archive.writestr(name, buffer.getvalue())
        archive.writestr("dataset.json", json.dumps(
            {"labels": [list(pair) for pair in zip(names, labels, strict=True)]}))
    return path


LEVELS = [10, 200, 119, 121, 90, 255, 0, 130, 60, 150]
LABELS = [0, 1, 1, 1, 0, 0, 0, 1, 0, 0]  # wrong for the third, the sixth and the last


def call(*args):
    fid.main([str(arg) for arg in args], standalone_mode=False)


def refused(capsys, *args, code=1):
    with pytest.raises(SystemExit) as caught:
        fid.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert caught.value.code == code and out == "", err
    return err.strip().splitlines()[-1]


def values_in(path):
    return {line["metric"]: line["value"] for line in map(json.loads, path.read_text().splitlines())
            if line.get("of_class") is None}


# --------------------------------------------------------------------------------- class accuracy


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_class_accuracy_is_the_share_of_images_of_the_class_asked_for(tmp_path, judge, batch):
    data = write_levels(tmp_path / "x.zip", LEVELS, LABELS)
    call("calc", f"--images={data}", "--count=10", "--metrics=ca", f"--detector={judge}",
         f"--out={tmp_path / 'm.jsonl'}", f"--batch={batch}", *CPU)
    [line] = map(json.loads, (tmp_path / "m.jsonl").read_text().splitlines())
    assert line["metric"] == "class_accuracy" and line["value"] == 0.7
    assert re.fullmatch("classifier:[0-9a-f]{16}", line["detector"])
    assert line["detector_sha256"].startswith(line["detector"].partition(":")[2])
    assert line["reference"] is None


def test_the_classes_of_a_random_part_go_with_its_images(tmp_path, judge):
    """All labels are right, so any part has an accuracy of 1."""
    data = write_levels(tmp_path / "x.zip", LEVELS, [int(level > BRIGHT) for level in LEVELS])
    call("calc", f"--images={data}", "--count=6", "--seed=3", "--metrics=ca", f"--detector={judge}",
         f"--out={tmp_path / 'm.jsonl'}", *CPU)
    assert values_in(tmp_path / "m.jsonl") == {"class_accuracy": 1.0}


def hits_of(detector, parts):
    features = FeatureSet(10, detector, ["ca"], asked=LABELS)
    images = torch.tensor(LEVELS, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    features.append(images[:0], [])
    for part in parts:
        features.append(images[part], part)
    return features


def test_order_and_batches_change_no_class_accuracy(judge):
    detector = build_detector(str(judge))
    for order in itertools.islice(itertools.permutations(range(10)), 0, 3_628_800, 400_000):
        features = hits_of(detector, [list(order[:4]), list(order[4:5]), list(order[5:])])
        features.finish()
        assert features.hits.share() == 0.7


def test_class_accuracy_goes_on_from_unfinished_sums(tmp_path, judge, capsys):
    detector, kept = build_detector(str(judge)), UnfinishedSums(tmp_path / "kept", {})
    kept.save(hits_of(detector, [[0, 1, 2]]), 3)
    features, done = kept.restored(lambda: hits_of(detector, []))
    assert done == features.hits.count == 3 and features.hits.share() == 2 / 3
    [path] = (tmp_path / "kept").iterdir()
    np.savez(path, **{**np.load(path), "hits.num": np.zeros(3, np.int64)})
    assert kept.restored(lambda: hits_of(detector, []))[1] == 0
    assert "starts over" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("flags, classes", [([], {0, 1}), (["--class=0"], {0}),
                                            (["--class=1"], {1})])
def test_gen_compares_with_the_class_of_each_seed(tmp_path, judge, flags, classes):
    network = write_snapshot(tmp_path / "network-snapshot-000001.pt")
    how = [f"--network={network}", "--seeds=0-15", "--steps=2", *flags]
    generate.main([*how, f"--outdir={tmp_path / 'x'}", "--device=cpu"], standalone_mode=False)
    by = ["--metrics=ca", f"--detector={judge}", *CPU]
    call("gen", *how, f"--out={tmp_path / 'gen.jsonl'}", *by)
    call("calc", f"--images={tmp_path / 'x'}", "--count=16", *by,
         f"--out={tmp_path / 'calc.jsonl'}")
    labels = dict(json.loads((tmp_path / "x/dataset.json").read_text())["labels"])
    seen = {name: int(np.asarray(PIL.Image.open(tmp_path / "x" / name)).mean() > BRIGHT)
            for name in labels}
    share = np.mean([seen[name] == labels[name] for name in labels])
    assert set(labels.values()) == classes and (flags or 0 < share < 1)
    assert values_in(tmp_path / "gen.jsonl") == values_in(tmp_path / "calc.jsonl") == {
        "class_accuracy": share}


@pytest.mark.long
def test_kept_features_give_the_class_accuracy_of_the_images(tmp_path, judge, capsys):
    network = write_snapshot(tmp_path / "network-snapshot-000001.pt")
    kept = tmp_path / "kept.npz"
    args = ["gen", f"--network={network}", "--seeds=0-9", "--steps=2", f"--detector={judge}", *CPU]
    call(*args, "--metrics=is", f"--features={kept}", f"--out={tmp_path / 'a.jsonl'}")
    call(*args, "--metrics=ca", f"--out={tmp_path / 'b.jsonl'}")
    capsys.readouterr()
    call(*args, "--metrics=ca", f"--features={kept}", f"--out={tmp_path / 'a.jsonl'}")
    assert f"from {kept}" in capsys.readouterr().out
    assert values_in(tmp_path / "a.jsonl").items() >= values_in(tmp_path / "b.jsonl").items()
    assert "--metrics=ca: --images=" in (text := refused(
        capsys, "calc", f"--images={kept}", "--count=10", "--metrics=ca", f"--detector={judge}",
        *CPU, code=2)) and "holds features without classes; leave ca out" in text


def test_classes_by_themselves_have_an_accuracy_each(tmp_path, judge):
    data = write_levels(tmp_path / "x.zip", LEVELS, LABELS)
    call("calc", f"--images={data}", "--count=10", "--metrics=ca", "--per-class", f"--ref={data}",
         f"--detector={judge}", f"--out={tmp_path / 'm.jsonl'}", *CPU)
    found = {line.get("of_class"): line["value"] for line in map(
        json.loads, (tmp_path / "m.jsonl").read_text().splitlines())}
    assert found == {None: 0.7, 0: 4 / 6, 1: 3 / 4, "mean": pytest.approx((4 / 6 + 3 / 4) / 2)}


@pytest.mark.slow
@pytest.mark.scripts
def test_two_processes_give_the_class_accuracy_of_one(tmp_path, judge):
    data = write_levels(tmp_path / "x.zip", LEVELS, LABELS)
    run_script("fid.py", "calc", f"--images={data}", "--count=10", "--metrics=ca", "--batch=2",
               f"--detector={judge}", f"--out={tmp_path / 'm.jsonl'}", *CPU, processes=2)
    assert values_in(tmp_path / "m.jsonl") == {"class_accuracy": 0.7}


def test_reports_take_a_higher_class_accuracy_for_better(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(
        {"metric": "class_accuracy", "value": 0.9, "num": 5, "detector": "classifier:0123"}) + "\n")
    [score] = read_scores(tmp_path)
    group = ScoreGroup.of(score)
    assert group.is_lower_better is False and group.title == "class accuracy (classifier:0123)"


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("detector, words", [
    ("pixels", "detector pixels: class accuracy needs a detector that was trained"),
    ("inception", "detector inception: class accuracy needs a detector that was trained"),
])
def test_detectors_without_the_classes_of_the_data_are_refused(tmp_path, capsys, detector, words):
    data = write_levels(tmp_path / "x.zip", LEVELS, LABELS)
    assert words in refused(capsys, "calc", f"--images={data}", "--count=10", "--metrics=ca",
                            f"--detector={detector}", *CPU)


def test_images_and_networks_whose_classes_do_not_fit_are_refused(tmp_path, judge, capsys):
    by_brightness(classes=3).save(tmp_path / "three.npz")
    many = write_levels(tmp_path / "many.zip", LEVELS, [*LABELS[:-1], 2])
    none = write_dataset(tmp_path / "none.zip", num=10, classes=0)
    calc, gen = (["calc", "--count=10", "--metrics=ca", *CPU],
                 ["gen", "--seeds=0-3", "--metrics=ca", *CPU])
    assert "many.zip: has 3 classes, but detector classifier:" in refused(
        capsys, *calc, f"--images={many}", f"--detector={judge}")
    assert re.search("--metrics=ca: .*none.zip has no classes; leave ca out", refused(
        capsys, *calc, f"--images={none}", f"--detector={judge}"))
    two, plain = (write_snapshot(tmp_path / f"{label_dim}.pt", label_dim=label_dim)
                  for label_dim in (2, 0))
    assert re.search(r"2.pt: has 2 classes, but detector classifier:\w+ knows 3", refused(
        capsys, *gen, f"--network={two}", f"--detector={tmp_path / 'three.npz'}"))
    assert re.search("--metrics=ca: .*0.pt has no classes; leave ca out", refused(
        capsys, *gen, f"--network={plain}", f"--detector={judge}", code=2))
    vectors = write_snapshot(tmp_path / "v.pt", label_dim=3, dataset={"label_kind": "vectors"})
    labels = write_dataset(tmp_path / "vectors.zip", vectors=True)
    assert "v.pt has no classes; leave ca out" in refused(
        capsys, *gen, f"--network={vectors}", f"--labels={labels}", f"--detector={judge}", code=2)


def test_networks_that_could_not_be_scored_are_refused_before_they_are_trained(tmp_path, judge):
    """As sweep.py does it."""
    two, three, none = (write_dataset(tmp_path / f"{k}.zip", num=12, classes=k) for k in (2, 3, 0))

    def check(path, detector=str(judge)):
        check_scoring(detector, str(path), ["fid", "ca"],
                      ImageFolderDataset(path, use_labels=True), "the data")

    check(two)
    with pytest.raises(ValueError, match="^the data: has 3 classes, but detector .* knows 2; "):
        check(three)
    with pytest.raises(ValueError, match="^the data: has no classes"):
        check(none)
    with pytest.raises(ValueError, match="^the data: detector pixels: class accuracy needs"):
        check(two, "pixels")


def test_a_part_of_the_classes_can_be_scored(tmp_path):
    by_brightness(classes=3).save(tmp_path / "three.npz")
    data = write_levels(tmp_path / "x.zip", LEVELS, LABELS)
    call("calc", f"--images={data}", "--count=10", "--metrics=ca", *CPU,
         f"--detector={tmp_path / 'three.npz'}", f"--out={tmp_path / 'm.jsonl'}")
    assert values_in(tmp_path / "m.jsonl") == {"class_accuracy": 0.7}


SCALED = {"center": [8.0], "spread": [8.0]}


@pytest.mark.parametrize("shape, scale, image, of_images, words", [
    ((1, 8, 8), None, (3, 8, 8), None, "8-bit 8x8 images of 1 channel, but these .* of 3"),
    ((1, 8, 8), None, (1, 8, 6), None, "8x8 .* these are 8-bit 6x8"),
    ((1, 8, 8), None, (1, 8, 8), SCALED, "these are floating-point or 16-bit"),
    ((1, 8, 8), SCALED, (1, 8, 8), None, "these are 8-bit"),
    ((1, 8, 8), SCALED, (1, 8, 8), {"center": [8.0], "spread": [9.0]}, "of another scale"),
    ((1, 8, 8), SCALED, (1, 8, 8), SCALED, None),
    ((1, 8, 8), None, (1, 8, 8), None, None),
])
def test_images_of_another_shape_or_scale_are_refused(tmp_path, shape, scale, image, of_images,
                                                      words):
    by_brightness(shape, scale=scale).save(tmp_path / "judge.npz")
    detector = build_detector(str(tmp_path / "judge.npz"))
    if words is None:
        assert detector.dim_of(image, of_images) == detector.feature_dim == 2
    else:
        with pytest.raises(ValueError, match=words):
            detector.dim_of(image, of_images)


def test_every_command_refuses_data_of_another_scale(tmp_path, capsys):
    by_brightness((1, 8, 8), scale=SCALED).save(tmp_path / "judge.npz")
    np.savez(tmp_path / "x.npz", np.zeros([10, 8, 8, 1], np.uint16), np.arange(10) % 2)
    dataset_tool.main([f"--source={tmp_path / 'x.npz'}", f"--dest={tmp_path / 'x.zip'}",
                       "--scale=0,15", "--workers=1"], standalone_mode=False)
    capsys.readouterr()
    x, by = tmp_path / "x.zip", [f"--detector={tmp_path / 'judge.npz'}", *CPU]
    for args in (["calc", f"--images={x}", "--count=10", "--metrics=ca"],
                 ["ref", f"--data={x}", f"--dest={tmp_path / 'r.npz'}"],
                 ["nearest", f"--images={x}", f"--data={x}", f"--out={tmp_path / 'near'}"]):
        assert "was trained on images of another scale" in refused(capsys, *args, *by)


def damaged(path, **changes):
    """Writes the file anew, with these arrays and without those that are None."""
    arrays = {**np.load(path), **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


class Trap:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("changes, words", [
    ({"format": None}, "format"),
    ({"format": np.array("other")}, "format 'other', expected"),
    ({"format": np.array(["pfgmpp-classifier-1"])}, "format has shape"),
    ({"weights_1": None}, "layers are not numbered"),
    ({"weights_2": None, "biases_2": None}, "1 layers, expected 2"),
    ({"weights_4": np.zeros([2, 2])}, "layers are not numbered"),
    ({"weights_1": np.zeros([191, 2], np.float32)}, r"weights_1 has shape \[191, 2\]"),
    ({"biases_1": np.zeros(3, np.float32)}, r"biases_1 \[3\]"),
    ({"biases_2": None}, "biases_2"),
    ({"weights_2": np.full([2, 2], np.nan, np.float32)}, "layer 2 has values that are not finite"),
    ({"biases_2": np.full(2, 1e300)}, "layer 2 has values that are not finite"),
    ({"weights_2": np.zeros([2, 1], np.float32), "biases_2": np.zeros(1)}, "1 class, at least 2"),
    ({"weights_2": np.array([[Trap()] * 2] * 2)}, "type object"),
    ({"weights_1": np.zeros([192, 2], np.int64)}, "expected floats"),
    ({"image_shape": np.array([3, 8, -8])}, "image_shape is"),
    ({"image_shape": np.array([1 << 40, 1 << 40, 1])}, "image_shape is"),
    ({"image_shape": np.array([3, 64])}, "image_shape has shape"),
    ({"scale": np.array([[0.0], [-1.0]])}, "must hold equally many finite numbers"),
    ({"scale": np.zeros([2, 2]) + 1}, "has 2 channels"),
    ({"accuracy": np.array(np.nan)}, "accuracy"),
    ({"accuracy": None}, "accuracy"),
    ({"held_out": np.array(-1)}, "held_out"),
])
def test_hostile_files_are_refused_in_one_line(judge, capsys, changes, words):
    damaged(judge, **changes)
    with pytest.raises(ValueError, match=f"judge.npz: not a classifier .*{words}") as caught:
        Perceptron.load(judge)
    assert "\n" not in str(caught.value) and capsys.readouterr().out == ""


def test_other_files_are_refused_in_one_line(judge, tmp_path, capsys):
    whole = judge.read_bytes()
    compressed = tmp_path / "c.npz"
    np.savez_compressed(compressed, **np.load(judge))
    header = b"'shape': (192, 2)"
    assert header in whole
    for data in (b"", b"no zip", whole[:-40], whole[:200], compressed.read_bytes(),
                 whole.replace(header, b"'shape': (9**9,2)"),
                 whole.replace(header, b"'shape': (999, 2)")):
        judge.write_bytes(data)
        with pytest.raises(ValueError, match="judge.npz: not a classifier"):
            Perceptron.load(judge)
    x = write_levels(tmp_path / "x.zip", LEVELS, LABELS)
    assert "no_such.npz: no such file" in refused(
        capsys, "calc", f"--images={x}", "--count=10", "--metrics=ca",
        f"--detector={tmp_path / 'no_such.npz'}", *CPU).replace("No such", "no such")


# ----------------------------------------------------------------------- what a classifier computes


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
@pytest.mark.parametrize("classes", [2, 3])
def test_features_and_probabilities_are_those_of_scikit_learn(tmp_path, classes):
    from sklearn.neural_network import MLPClassifier
    rng = np.random.default_rng(0)
    y = np.arange(60) % classes
    x = rng.standard_normal([60, 2, 3, 4]).astype(np.float32) + y[:, None, None, None]
    model = MLPClassifier((7, 5), max_iter=50, random_state=0).fit(x.reshape(60, -1), y)

    class Data:
        image_shape, scale = [2, 3, 4], {"center": [1.0, 2.0], "spread": [3.0, 4.0]}

    of_model(model, Data).save(tmp_path / "m.npz")
    detector = build_detector(str(tmp_path / "m.npz"))
    assert detector.num_classes == classes
    test = rng.standard_normal([50, 2, 3, 4]).astype(np.float32) + 0.5
    features = detector(torch.from_numpy(test))
    h = test.reshape(50, -1)
    for weights, biases in zip(model.coefs_[:-1], model.intercepts_[:-1], strict=True):
        h = np.maximum(h @ weights + biases, 0)
    assert np.allclose(features.numpy(), h, atol=1e-5) and features.shape[1] == 5
    p = detector.logits(features).softmax(1).numpy()
    assert np.allclose(p, model.predict_proba(test.reshape(50, -1)), atol=1e-5)
    truth = rng.integers(0, classes, 50)
    found = FeatureSet(50, detector, ["ca"], asked=truth)
    found.append(torch.from_numpy(test), range(50))
    found.finish()
    assert found.hits.share() == pytest.approx(model.score(test.reshape(50, -1), truth), abs=1e-12)


def test_8_bit_images_are_seen_as_networks_see_them(judge):
    """Features are 1 + the mean of x/127.5 - 1, a sum of 192 terms in float32."""
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    assert torch.allclose(build_detector(str(judge))(images)[:, 0], torch.tensor([0.0, 0.4, 2.0]),
                          atol=1e-5)


def test_a_file_is_read_as_it_was_written(tmp_path):
    known = dataclasses.replace(by_brightness((2, 4, 4), scale={
        "center": [1.0, 2.0], "spread": [3.0, 4.0]}), accuracy=0.75, num_held_out=8)
    known.save(tmp_path / "new/a.npz")
    found = Perceptron.load(tmp_path / "new/a.npz")
    for name in ("weights", "biases"):
        assert all(map(torch.equal, getattr(found, name), getattr(known, name)))
    assert [getattr(found, name) for name in ("image_shape", "scale", "accuracy", "num_held_out")] \
        == [(2, 4, 4), {"center": [1.0, 2.0], "spread": [3.0, 4.0]}, 0.75, 8]


def test_distances_by_a_classifier_have_names_of_their_own(judge):
    detector = build_detector(str(judge))
    assert isinstance(detector, Classifier)
    assert detector.distance_name == "classifier Frechet distance"
    assert title("kernel_distance", detector.name) == "classifier kernel distance"


# ----------------------------------------------------------------------------------------- training


def test_copies_are_moved_to_the_four_sides_and_repeat_the_edge():
    images = np.random.default_rng(0).standard_normal([3, 2, 6, 5])
    assert moved_copies(images, 0)[0] is images and len(moved_copies(images, 0)) == 1
    same, *moved = moved_copies(images, 2)
    assert np.array_equal(same, images)
    rows, columns = np.arange(6), np.arange(5)
    for copy, (down, right) in zip(moved, [(2, 0), (-2, 0), (0, 2), (0, -2)], strict=True):
        expected = images[:, :, np.clip(rows - down, 0, 5)][..., np.clip(columns - right, 0, 4)]
        assert np.array_equal(copy, expected)


@pytest.mark.long
def test_the_command_writes_a_classifier_with_its_held_out_accuracy(tmp_path, capsys):
    """Brightness tells the class of these images, so it knows all but the mislabelled one."""
    train = write_dataset(tmp_path / "train.zip", num=60)
    held_out = write_levels(tmp_path / "val.zip", [20, 220, 30, 210], [0, 1, 0, 0])
    for name in ("a.npz", "b.npz"):
        call("classifier", f"--data={train}", f"--val-data={held_out}",
             f"--dest={tmp_path / name}", "--hidden=16,8", "--seed=1")
    assert "a.npz: a classifier of 2 classes; recognises 3 of 4 held-out images, 75.00%" in \
        capsys.readouterr().out
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    found = Perceptron.load(tmp_path / "a.npz")
    assert (found.accuracy, found.num_held_out, found.scale) == (0.75, 4, None)
    assert [list(w.shape) for w in found.weights] == [[192, 16], [16, 8], [8, 2]]
    call("calc", f"--images={held_out}", "--count=4", f"--detector={tmp_path / 'a.npz'}",
         "--metrics=ca", f"--out={tmp_path / 'm.jsonl'}", *CPU)
    assert values_in(tmp_path / "m.jsonl") == {"class_accuracy": 0.75}


def test_what_no_classifier_can_be_trained_on_is_refused(tmp_path, capsys, monkeypatch):
    data = write_dataset(tmp_path / "x.zip", num=20)
    names = {"none": {"classes": 0}, "big": {"side": 72}, "small": {"side": 4},
             "one": {"classes": 1}, "three": {"classes": 3}, "vectors": {"vectors": True}}
    found = {name: write_dataset(tmp_path / f"{name}.zip", num=6, **how)
             for name, how in names.items()}
    gap = write_levels(tmp_path / "gap.zip", LEVELS, [2 * label for label in LABELS])

    def words(data, held_out=data, dest=tmp_path / "new.npz", *flags, code=1):
        return refused(capsys, "classifier", f"--data={data}", f"--val-data={held_out}",
                       f"--dest={dest}", *flags, code=code)

    assert "--data=" in (text := words(found["none"])) and "has no class numbers" in text
    assert "has no class numbers" in words(found["vectors"])
    assert "--val-data=" in (text := words(data, found["none"])) and "no class numbers" in text
    assert "15552 values per image" in words(found["big"])
    assert "at least two classes" in words(found["one"])
    assert "of every class from 0 to 2" in words(gap)
    assert "differ in shape or scale" in words(data, found["small"])
    assert "has an image of class 2, but" in words(data, found["three"])
    assert "is --data itself" in words(data, tmp_path / "../" / tmp_path.name / "x.zip")
    assert "must be a file with extension .npz" in words(data, data, tmp_path / "new.pt")
    (tmp_path / "file").write_text("")
    assert "give another file" in words(data, data, tmp_path / "file/new.npz")
    assert (fid._MAX_LAYERS, fid._MAX_WIDTH) == (classifier.MAX_LAYERS, classifier.MAX_WIDTH)
    for hidden in ("0", "5000", "1,1,1,1,1,1,1,1"):
        assert "must be 1 to 7 numbers from 1 to 4096" in words(
            data, data, tmp_path / "new.npz", f"--hidden={hidden}", code=2)
    monkeypatch.setattr("metrics.classifier_training._MAX_BYTES", 1 << 10)
    assert "or --shift=0" in words(data)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs scikit-learn: pip install scikit-learn" in words(data)
    assert not (tmp_path / "new.npz").exists()


@pytest.mark.long
def test_the_shipped_judge_has_the_recorded_accuracy_on_the_held_out_digits(tmp_path):
    dataset_tool.main(["split", str(ROOT / "examples/digits8.zip"), "--val=0.2",
                       f"--dest={tmp_path / 'train.zip'}", f"--val-dest={tmp_path / 'val.zip'}"],
                      standalone_mode=False)
    known = Perceptron.load(JUDGE)
    assert known.num_held_out == 359 and known.accuracy >= 0.975
    call("calc", f"--images={tmp_path / 'val.zip'}", "--count=359", "--metrics=ca",
         f"--detector={JUDGE}", f"--out={tmp_path / 'm.jsonl'}", *CPU)
    assert values_in(tmp_path / "m.jsonl") == {"class_accuracy": known.accuracy}


def test_the_shipped_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits
    digits, data = load_digits(), ImageFolderDataset(ROOT / "examples/digits8.zip", use_labels=True)
    assert np.array_equal(data.get_batch(range(len(data)))[0][:, 0], digits.images)
    assert np.array_equal(data.class_numbers, digits.target)
    assert data.scale == {"center": [8.0], "spread": [8.0]}


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_features_that_are_not_finite_are_refused(lost):
    images = torch.zeros(3, 1, 4, 4)
    images[lost, 0, 1, 2] = math.nan if lost else math.inf
    found = FeatureSet(3, Pixels(), ["fid"])
    found.append(images[:2], [0, 1])
    found.append(images[2:], [2])
    with pytest.raises(ValueError, match="detector pixels: features of an image are not finite"):
        found.finish()


@pytest.mark.parametrize("flag, words", [
    ("--alpha=nan", "nan is not a finite number"), ("--alpha=inf", "inf"),
    ("--shift=8", "--shift=8: must be smaller than the sides of the images, 8x8")])
def test_settings_of_training_that_make_no_sense_are_refused(flag, words, dataset_zip, tmp_path,
                                                            invoke):
    held_out = write_dataset(tmp_path / "val.zip", num=6)
    done = invoke(fid.main, "classifier", f"--data={dataset_zip}", f"--val-data={held_out}",
                  f"--dest={tmp_path / 'judge.npz'}", flag)
    assert done.exit_code in (1, 2) and words in done.output
    assert not (tmp_path / "judge.npz").exists()


def test_a_copy_of_the_training_data_is_not_held_out(dataset_zip, tmp_path, invoke):
    copy = shutil.copy(dataset_zip, tmp_path / "copy.zip")
    done = invoke(fid.main, "classifier", f"--data={dataset_zip}", f"--val-data={copy}",
                  f"--dest={tmp_path / 'judge.npz'}")
    assert done.exit_code == 1 and "is --data itself, so nothing is held out" in done.output
