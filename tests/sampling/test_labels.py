"""Labels of samples: which classes are drawn and how often, label vectors, what is recorded."""

import json
import re

import numpy as np
import pytest
import torch
from image_sources import write_source
from snapshots import write_snapshot
from tiny import TINY_RUN, write_dataset

import dataset_tool
import fid
import generate
import train
from checkpoints import checkpoint
from checkpoints.names import find_network
from images.dataset import ImageFolderDataset
from pfgmpp.samplers import draw_latents
from sampling.image_writer import ImageFolder
from sampling.labels import DrawnClasses, classes_with_images, read_labels
from sampling.network_sampler import NetworkSampler

CPU = torch.device("cpu")
SEEDS = range(4000)


def drawn(num_classes, seeds=SEEDS):
    rng = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randint(num_classes, [], generator=one) for one in rng])


def sampler_of(path, **options):
    return NetworkSampler.open(str(path), CPU, num_steps=2, **options)


# ---------------------------------------------------------------------------- the law of classes

@pytest.mark.parametrize("shares", [[3, 1], [0, 5, 0, 1, 4], [0, 1, 1], [1, 2, 3, 0]])
def test_classes_come_as_often_as_their_shares_say(shares):
    labels = DrawnClasses(shares)(SEEDS, drawn(len(shares)))
    assert labels.shape == (len(SEEDS), len(shares)) and (labels.sum(1) == 1).all()
    expected = np.array(shares) / np.sum(shares)
    found = labels.mean(0).numpy()
    assert (found[expected == 0] == 0).all()
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / len(SEEDS))


def test_equal_shares_leave_the_classes_that_seeds_draw():
    classes = drawn(7)
    assert DrawnClasses([4] * 7)(SEEDS, classes).argmax(1).equal(classes)
    assert classes_with_images([4] * 7) is None and classes_with_images(None) is None


def test_a_class_follows_from_the_seed_and_its_draw_alone():
    labels, classes = DrawnClasses([1, 0, 2]), drawn(3)
    whole = labels(SEEDS, classes)
    assert whole[[5, 17]].equal(labels([5, 17], classes[[5, 17]]))
    assert [int(k) for k in whole[:12].argmax(1)] == [2, 2, 0, 2, 2, 2, 2, 0, 0, 2, 2, 0]


# ------------------------------------------------------------------------- networks and flags

@pytest.fixture(scope="module")
def unbalanced(tmp_path_factory):
    return write_snapshot(tmp_path_factory.mktemp("net") / "net.pt", label_dim=4, dataset={
        "label_kind": "classes", "class_counts": [0, 30, 0, 10], "class_names": list("abcd")})


def test_classes_without_images_are_never_sampled(unbalanced):
    seeds = range(200)
    found = np.bincount(sampler_of(unbalanced).classes(seeds), minlength=4)
    assert found[[0, 2]].tolist() == [0, 0] and 80 < found[1] < 120
    assert np.bincount(sampler_of(unbalanced, class_idx="uniform").classes(seeds)).tolist() == \
        found.tolist()
    shares = np.bincount(sampler_of(unbalanced, class_idx="data").classes(seeds), minlength=4)
    assert shares[[0, 2]].tolist() == [0, 0] and 130 < shares[1] < 170
    assert set(sampler_of(unbalanced, class_idx=3).classes(seeds)) == {3}


def test_the_other_draws_of_a_seed_stay_whatever_its_class(unbalanced):
    latents = []
    for choice in (None, "data", 1):
        sampler = sampler_of(unbalanced, class_idx=choice)
        kwargs = {"labels": sampler.labels} if sampler.labels else {"class_idx": sampler.class_idx}
        z, _, rnd = draw_latents(sampler.net, range(5), CPU, **kwargs)
        latents.append((z, rnd.randn_like(z)))
    for z, noise in latents[1:]:
        assert z.equal(latents[0][0]) and noise.equal(latents[0][1])


def test_without_a_record_all_classes_are_sampled(tmp_path):
    path = write_snapshot(tmp_path / "net.pt", label_dim=3)
    sampler = sampler_of(path)
    assert sampler.labels is None and set(sampler.classes(range(40))) == {0, 1, 2}
    for counts in ([1, 2], [0, 0, 0], [1, -1, 1], "abc", [1.5, 1, 1], None):  # of no use
        path = write_snapshot(tmp_path / "net.pt", label_dim=3, dataset={
            "label_kind": "classes", "class_counts": counts})
        assert sampler_of(path).labels is None


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    return write_snapshot(tmp_path_factory.mktemp("net") / "net.pt", label_dim=3,
                          dataset={"label_kind": "vectors"})


def test_label_vectors_are_given_by_seed(vectors, tmp_path):
    values = np.random.default_rng(0).normal(size=[5, 3]).astype(np.float32)
    np.save(tmp_path / "labels.npy", values)
    (tmp_path / "labels.json").write_text(json.dumps(values.tolist()))
    dataset = write_dataset(tmp_path / "data.zip", num=6, vectors=True)
    given = ImageFolderDataset(dataset, use_labels=True)
    for source, expected in (("labels.npy", values), ("labels.json", values),
                             ("data.zip", given.labels_of(np.arange(6)))):
        sampler = sampler_of(vectors, label_source=str(tmp_path / source))
        [batch] = sampler.images([[0, 4, 7]])
        assert np.array_equal(batch.class_labels.numpy(), expected[[0, 4, 7 % len(expected)]])
        assert len(sampler.settings["labels"]) == 64 and sampler.classes([0]) is None
    images = []
    for row in (0, 1):
        np.save(tmp_path / "one.npy", values[row:row + 1])
        images.append(next(sampler_of(vectors, label_source=str(tmp_path / "one.npy")).images(
            [[3]])).images)
    assert not torch.allclose(*images, atol=1e-3)


def test_a_network_of_vectors_takes_no_class_numbers(vectors, tmp_path):
    (tmp_path / "x.json").write_text("[1, 0]")
    for source in (tmp_path / "x.json", write_dataset(tmp_path / "data.zip", num=6, classes=2)):
        with pytest.raises(ValueError, match="class numbers, but the network was trained on vec"):
            sampler_of(vectors, label_source=str(source))


def test_an_odd_entry_of_labels_is_not_passed_over(vectors, tmp_path):
    (tmp_path / "x.json").write_text('{"labels": [["a", [1, 2, 3]], ["b"], ["c", [1, 2, 3]]]}')
    with pytest.raises(ValueError, match="entry 1"):
        sampler_of(vectors, label_source=str(tmp_path / "x.json"))


def test_class_numbers_may_be_given_by_seed_too(unbalanced, tmp_path):
    (tmp_path / "x.json").write_text("[3, 1, 1]")
    assert sampler_of(unbalanced, label_source=str(tmp_path / "x.json")).classes(range(5)) == [
        3, 1, 1, 3, 1]
    dataset = write_dataset(tmp_path / "data.zip", num=6, classes=2)
    with pytest.raises(ValueError, match="the training data have no images of class 0"):
        sampler_of(unbalanced, label_source=str(dataset))
    plain = write_snapshot(tmp_path / "plain.pt", label_dim=2)
    assert sampler_of(plain, label_source=str(dataset)).classes(range(4)) == [0, 1, 0, 1]


REFUSED = [
    ("vectors", [], 2, "give them with --labels=FILE|DATASET"),
    ("vectors", ["--class=1"], 2, "--class=1: "),
    ("vectors", ["--class=data"], 2, "label vectors of 3 numbers"),
    ("unbalanced", ["--class=0"], 2, "have no images of this class; "
     "they have classes 1,3"),
    ("unbalanced", ["--class=4"], 2, "between 0 and 3"),
    ("unbalanced", ["--class=dog"], 2, "--class=dog: must be a class number from 0 to 3, uniform "
     "or data, or a name: a, b, c, d; --labels takes one class for each seed"),
    ("unbalanced", ["--class=1", "--labels=x.json"], 2, "give one of them"),
    ("unbalanced", ["--labels=nowhere"], 1, "nowhere: no such file"),
    ("plain", ["--class=data"], 2, "does not record how many"),
    ("none", ["--class=uniform"], 2, "unconditional; leave --class out"),
    ("none", ["--labels=x.json"], 2, "unconditional; leave --labels out"),
]


@pytest.mark.parametrize("network, args, code, words", REFUSED)
def test_labels_that_do_not_fit_are_refused_in_one_line(network, args, code, words, unbalanced,
                                                       vectors, tmp_path, invoke):
    path = {"unbalanced": unbalanced, "vectors": vectors}.get(network) or write_snapshot(
        tmp_path / "net.pt", label_dim={"plain": 2, "none": 0}[network])
    result = invoke(generate.main, f"--network={path}", f"--outdir={tmp_path / 'out'}",
                    "--seeds=0", *args)
    assert result.exit_code == code and words in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, content, words", [
    ("x.npy", np.zeros([4, 2]), r"labels have shape \[4, 2\]"),
    ("x.npy", np.zeros([0, 3]), "shape"),
    ("x.npy", np.array([0.5, 1.5]), "whole numbers"), ("x.npy", np.array([0, 3]), "0 to 2"),
    ("x.npy", np.full([2, 3], np.nan), "finite"), ("x.npy", np.array(["a"]), "a str"),
    ("x.json", "[]", "list of labels"), ("x.json", "{}", "list of labels"),
    ("x.json", "[1, [1, 2, 3]]", "label 1"), ("x.json", "[", "line 1"),
    ("x.txt", "hello", "line 1")])
def test_files_of_labels_are_checked(name, content, words, tmp_path):
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    else:
        np.save(tmp_path / name, content)
    with pytest.raises(ValueError, match=words) as error:
        read_labels(tmp_path / name, 3)
    assert str(tmp_path / name) in str(error.value)


# ------------------------------------------------------------------------- what is recorded

def test_a_folder_of_samples_is_a_labelled_data_set(unbalanced, tmp_path, invoke):
    out = tmp_path / "out"
    args = [f"--network={unbalanced}", f"--outdir={out}", "--steps=2", "--subdirs"]
    assert invoke(generate.main, *args, "--seeds=0-5,1000").exit_code == 0
    (out / "000000/000002.png").unlink()
    (out / "dataset.json").unlink()  # as if another run had been killed
    assert invoke(generate.main, *args, "--seeds=0-9").exit_code == 0
    record = json.loads((out / "dataset.json").read_text())
    seeds = [*range(10), 1000]
    assert record["class_names"] == list("abcd")
    assert record["labels"] == [
        [f"{seed - seed % 1000:06d}/{seed:06d}.png", label]
        for seed, label in zip(seeds, sampler_of(unbalanced).classes(seeds), strict=True)]
    dataset = ImageFolderDataset(out, use_labels=True)
    assert len(dataset) == 11 and set(dataset.class_numbers) == {1, 3}
    assert "class 1 (b)" in invoke(dataset_tool.main, "check", str(out)).stdout


@pytest.mark.parametrize("stray", ["3", "\u00b3", "\u0663" * 6, "0003"])
def test_numbers_in_other_words_are_no_images_of_seeds(tmp_path, stray):
    folder = ImageFolder(tmp_path, (1, 4, 4), subdirs=False)
    for stem in ("000003", stray):
        (tmp_path / f"{stem}.png").touch()
    folder.record_labels({3: 1}, lambda seeds: [0] * len(seeds))
    assert json.loads((tmp_path / "dataset.json").read_text())["labels"] == [["000003.png", 1]]


def test_label_vectors_of_samples_are_recorded(vectors, tmp_path, invoke):
    np.save(tmp_path / "x.npy", np.float32([[1, 2, 3], [4, 5, 6]]))
    assert invoke(generate.main, f"--network={vectors}", f"--outdir={tmp_path / 'out'}",
                  "--steps=2", "--seeds=3,4", f"--labels={tmp_path / 'x.npy'}").exit_code == 0
    assert json.loads((tmp_path / "out/dataset.json").read_text()) == {
        "labels": [["000003.png", [4.0, 5.0, 6.0]], ["000004.png", [1.0, 2.0, 3.0]]]}


@pytest.mark.long
@pytest.mark.parametrize("is_vectors", [False, True])
def test_training_records_what_labels_are_and_samples_such(is_vectors, tmp_path, invoke):
    data = write_dataset(tmp_path / "data.zip", num=12, vectors=is_vectors)
    if not is_vectors:
        labels = [[f"{i:02}.png", 1 if i % 3 else 3] for i in range(12)]
        write_source(data, {f"{i:02}.png": np.full([8, 8, 3], 20 * i, np.uint8) for i in range(12)}
                     | {"dataset.json": json.dumps({"labels": labels, "class_names": list("abcd")})
                        .encode()})
    args = [f"--data={data}", f"--outdir={tmp_path}", "--name=run", "--duration=0.000016",
            "--tick=0.008", "--snap=1", *TINY_RUN, "--samples=4", "--device=cpu", "--cond=1",
            "--eval=0.008", "--eval-num=4", "--eval-detector=pixels", f"--eval-ref={data}"]
    result = invoke(train.main, *args)
    assert result.exit_code == 0, result.output
    found = find_network(tmp_path / "run")
    record = checkpoint.load(found)["dataset"]
    if is_vectors:
        assert record["label_kind"] == "vectors" and "class_counts" not in record
        with pytest.raises(ValueError, match="--labels"):
            sampler_of(found)
    else:
        assert record["label_kind"] == "classes" and record["class_counts"] == [0, 8, 0, 4]
        assert record["class_names"] == ["a", "b", "c", "d"]
        assert set(sampler_of(found).classes(range(20))) == {1, 3}


# -------------------------------------------------------------------- not finite, not averaged

@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    path = write_snapshot(tmp_path_factory.mktemp("net") / "net.pt", label_dim=0)
    content = checkpoint.load(path)
    name = next(name for name in content["ema"] if name.endswith("bias"))
    content["ema"][name][:] = np.nan
    checkpoint.save(path, {key: value for key, value in content.items() if key != "version"})
    return path


def test_images_that_are_not_finite_are_not_written(diverged, tmp_path, invoke):
    for _ in range(2):  # nothing is there the second time either
        result = invoke(generate.main, f"--network={diverged}", f"--outdir={tmp_path / 'out'}",
                        "--seeds=0-9", "--steps=2", "--batch=4")
        assert result.exit_code == 1 and not list((tmp_path / "out").glob("*.png"))
        assert ("10 of 10 images have values that are not finite and were not written: seeds "
                "0-5, ...") in result.stderr
        assert "0 images made" in result.stdout
    record = json.loads((tmp_path / "out/generate.json").read_text())
    assert record["not_finite"] == list(range(10))


def test_images_that_are_not_finite_have_no_score(diverged, tmp_path, invoke):
    ref = write_dataset(tmp_path / "ref.zip", num=8, classes=0)
    result = invoke(fid.main, "gen", f"--network={diverged}", "--seeds=0-3", "--steps=2",
                    f"--ref={ref}", "--detector=pixels", f"--out={tmp_path / 'm.jsonl'}",
                    "--device=cpu")
    assert result.exit_code == 1 and not (tmp_path / "m.jsonl").exists()
    assert "4 of 4 images have values that are not finite, so there is no score" in result.stderr


def test_floats_that_are_not_finite_have_no_score_either(diverged, tmp_path, invoke):
    """Their features are not finite, and yet it is the seeds that are named, not the detector."""
    scale = {"center": [8.0], "spread": [8.0]}
    content = checkpoint.load(diverged) | {"dataset": {"scale": scale}}
    checkpoint.save(tmp_path / "net.pt", {key: value for key, value in content.items()
                                          if key != "version"})
    (tmp_path / "ref").mkdir()
    for i in range(4):
        np.save(tmp_path / f"ref/{i}.npy", np.full([3, 8, 8], i, np.uint16))
    (tmp_path / "ref/dataset.json").write_text(json.dumps({"labels": None, "scale": scale}))
    result = invoke(fid.main, "gen", f"--network={tmp_path / 'net.pt'}", "--seeds=0-3", "--steps=2",
                    f"--ref={tmp_path / 'ref'}", "--detector=pixels", "--device=cpu")
    assert result.exit_code == 1
    assert "4 of 4 images have values that are not finite, so there is no score" in result.stderr


def test_a_network_is_named_by_its_run_directory(unbalanced, tmp_path, invoke):
    content = unbalanced.read_bytes()
    for name in ("network-snapshot-000009.pt", "network-snapshot-000010.pt",
                 "training-state-000010.pt"):
        (tmp_path / name).write_bytes(content)
    assert find_network(tmp_path) == str(tmp_path / "network-snapshot-000010.pt")
    result = invoke(generate.main, f"--network={tmp_path}", f"--outdir={tmp_path / 'out'}",
                    "--seeds=0", "--steps=2")
    assert result.exit_code == 0
    assert f"{tmp_path}/network-snapshot-000010.pt, the newest of {tmp_path}" in result.stdout
    for missing in ("network-snapshot-000012.pt", "net.pt"):
        result = invoke(generate.main, f"--network={tmp_path / missing}", "--seeds=0",
                        f"--outdir={tmp_path / 'out'}")
        assert result.exit_code == 1 and re.search(
            f"{missing}: no such file; .* has training-state-000010.pt, "
            "network-snapshot-000010.pt, network-snapshot-000009.pt", result.stderr)
    (tmp_path / "empty").mkdir()
    result = invoke(generate.main, f"--network={tmp_path / 'empty'}", "--seeds=0",
                    f"--outdir={tmp_path / 'out'}")
    assert result.exit_code == 1 and "no network-snapshot-*.pt or training-state" in result.stderr


def test_a_score_lies_in_the_run_and_names_the_network(unbalanced, tmp_path, invoke):
    run = tmp_path / "run"
    run.mkdir()
    (run / "network-snapshot-000010.pt").write_bytes(unbalanced.read_bytes())
    ref = write_dataset(tmp_path / "ref.zip", num=8, classes=0)
    done = invoke(fid.main, "gen", f"--network={run}", "--seeds=0-3", "--steps=2", "--device=cpu",
                  f"--ref={ref}", "--detector=pixels")
    assert done.exit_code == 0 and f"the newest of {run}" in done.stdout
    [line] = (run / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["network"] == str(run / "network-snapshot-000010.pt")


def test_sampling_says_which_states_it_takes(unbalanced, tmp_path, invoke):
    for i in range(1, 10):
        (tmp_path / f"training-state-{i:06d}.pt").write_bytes(unbalanced.read_bytes())
    result = invoke(generate.main, f"--outdir={tmp_path}", "--seeds=0", "--steps=2", "--ckpt=8")
    assert result.stdout.startswith("Sampling 2 of 9 training states, kimg 000008, 000009; "
                                    "limit the range with --end_ckpt=KIMG\n")


# -------------------------------------------------------------------------- where sampling starts

@pytest.fixture
def paired(tmp_path, invoke):
    images, conditions = (write_dataset(tmp_path / f"{name}.zip", num=4, classes=0, channels=3)
                          for name in ("images", "conditions"))
    done = invoke(dataset_tool.main, f"--source={images}", f"--cond-source={conditions}",
                  f"--dest={tmp_path / 'paired.zip'}", "--workers=1")
    assert done.exit_code == 0
    return tmp_path / "paired.zip"


def test_sampling_may_start_from_the_condition_images(paired, tmp_path, capsys):
    path = write_snapshot(tmp_path / "net.pt", label_dim=0, cond_channels=3)
    given = {"cond_image": str(paired), "init_sigma": 1.0}
    conditions = ImageFolderDataset(paired, use_conditions=True)
    own = sampler_of(path, init_image="cond", **given)
    expected = torch.from_numpy(np.stack([conditions[i][2] for i in (0, 1)])) / 127.5 - 1
    torch.testing.assert_close(own.inits([0, 1]), expected.float())
    assert capsys.readouterr().err == ""
    sampler_of(path, init_image=str(paired), **given)
    assert "--init-image=cond to start from the condition images" in capsys.readouterr().err
    plain = write_snapshot(tmp_path / "plain.pt", label_dim=0)
    with pytest.raises(ValueError, match="needs condition images; give a paired data set"):
        sampler_of(plain, init_image="cond", init_sigma=1.0)
    # A network without conditions may start from those of a paired set.
    torch.testing.assert_close(sampler_of(plain, init_image="cond", **given).inits([0, 1]),
                               expected.float())
    sampler_of(plain, init_image=str(paired), init_sigma=1.0)
    assert "--init-image=cond --cond-image=" in capsys.readouterr().err


@pytest.mark.parametrize("sigma, warns", [(2.5, False), (2.6, True), (60, True)])
def test_a_start_with_little_left_of_the_images_is_told(sigma, warns, tmp_path, capsys):
    path = write_snapshot(tmp_path / "net.pt", label_dim=0)
    images = write_dataset(tmp_path / "images.zip", num=4, classes=0)
    sampler_of(path, init_image=str(images), init_sigma=sigma)
    assert ("little is left of the images" in capsys.readouterr().err) == warns
