"""Scores of many networks in one start: what is computed, what is taken from where it stands."""

import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from scripts import ROOT, run_ranks
from snapshots import with_network, write_snapshot
from tiny import write_dataset

import fid
import generate
from checkpoints import checkpoint
from checkpoints.names import find_networks
from metrics import feature_files, score_log, scoring
from metrics.evaluator import Evaluator
from metrics.metrics import FeatureSet
from metrics.network_scores import seed_ranges
from metrics.unfinished import UnfinishedSums
from sampling.network_sampler import NetworkSampler

FAST = ["--detector=pixels", "--steps=2", "--device=cpu", "--workers=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "real.zip", num=30)


@pytest.fixture
def run(tmp_path):
    """A run with three snapshots, whose numbers are not in the order of their letters."""
    folder = tmp_path / "run"
    folder.mkdir()
    for seed, kimg in enumerate(("000010", "999000", "1000000")):
        write_snapshot(folder / f"network-snapshot-{kimg}.pt", seed=seed)
    return folder


def gen(run, data, *args, pattern="network-snapshot-*.pt"):
    fid.main(["gen", f"--network={run / pattern}", f"--ref={data}", "--seeds=0-8", "--batch=2",
              *FAST, *args], standalone_mode=False)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def values(run):
    return {(line["network"], line["seeds"], line["metric"]): line["value"] for line in lines(run)}


@pytest.fixture
def sampled(monkeypatch):
    """The seeds that are sampled, in order."""
    seeds, original = [], NetworkSampler.images

    def noted(self, batches, **how):
        for sample in original(self, batches, **how):
            seeds.extend(sample.seeds)
            yield sample

    monkeypatch.setattr(NetworkSampler, "images", noted)
    return seeds


# ----------------------------------------------------------------------------------- which networks


def test_a_pattern_names_networks_in_the_order_of_their_numbers(run):
    found = find_networks([str(run / "network-snapshot-*.pt")])
    assert [re.search(r"\d{6,}", path)[0] for path in found] == ["000010", "999000", "1000000"]
    assert find_networks([found[2], str(run), *found]) == [found[2], found[0], found[1]]
    with pytest.raises(FileNotFoundError, match=r"other-\*\.pt: no file matches this pattern"):
        find_networks([str(run / "other-*.pt")])


def test_a_name_with_brackets_is_the_file_of_that_name(tmp_path):
    path = tmp_path / "net[1].pt"
    path.write_bytes(b"")
    (tmp_path / "net1.pt").write_bytes(b"")
    assert find_networks([str(path)]) == [str(path)]


def _run_with(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_a_pattern_in_a_folder_with_brackets_matches_in_that_folder(tmp_path):
    own = _run_with(tmp_path / "run[1]", "network-snapshot-000010.pt")
    _run_with(tmp_path / "run1", "network-snapshot-000020.pt")
    assert find_networks([f"{own}/network-snapshot-*.pt"]) == [
        f"{own}/network-snapshot-000010.pt"]
    assert find_networks([f"{tmp_path}/run[1]*/*.pt"]) == [  # no folder is called so
        f"{tmp_path}/run1/network-snapshot-000020.pt"]


def test_of_run_directories_that_a_pattern_matches_each_gives_its_newest_network(
        tmp_path, monkeypatch):
    for letter in "ab":
        _run_with(tmp_path / f"run{letter}", "network-snapshot-000010.pt",
                  "network-snapshot-000020.pt", "stats.jsonl")
    _run_with(tmp_path / "runc", "stats.jsonl")
    monkeypatch.chdir(tmp_path)
    newest = [f"run{letter}/network-snapshot-000020.pt" for letter in "ab"]
    assert find_networks(["run?"]) == find_networks(["run*/"]) == newest
    with pytest.raises(FileNotFoundError, match=r"runc\*: none of the 1 matches .*\(runc\)"):
        find_networks(["runc*"])


def test_a_wide_pattern_takes_networks_and_nothing_else(tmp_path):
    run = _run_with(tmp_path / "run", "network-snapshot-000010.pt", "training-state-000010.pt",
                    "network-snapshot-latest.pkl", "metrics.jsonl", "other.pt", "log.txt")
    networks = {"network-snapshot-000010.pt", "training-state-000010.pt",
                "network-snapshot-latest.pkl"}
    for pattern in ("**", "*"):
        assert {os.path.basename(path) for path in find_networks([f"{run}/{pattern}"])} == networks


def test_a_wide_pattern_takes_files_of_weights_where_no_name_is_of_a_run(tmp_path):
    folder = _run_with(tmp_path / "weights", "b.safetensors", "a.ckpt", "c.PKL", "d.pt", "e.pth",
                       "config.json")
    assert find_networks([f"{folder}/*"]) == [
        f"{folder}/{name}" for name in ("a.ckpt", "b.safetensors", "c.PKL", "d.pt", "e.pth")]
    with pytest.raises(FileNotFoundError, match="none of the 1 matches.*config.json"):
        find_networks([f"{folder}/*.json"])


def test_ranges_follow_each_other_in_the_pattern_of_the_first():
    assert seed_ranges([0, 2, 5], 3) == [[0, 2, 5], [6, 8, 11], [12, 14, 17]]


# ----------------------------------------------------------------------------------- once and again


@pytest.mark.long
def test_each_network_point_and_range_is_scored_and_each_file_is_read_once(
        run, data, capsys, monkeypatch):
    read, original = [], checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda path, key=None: (
        read.append(path), original(path, key))[1])
    gen(run, data, "--steps=1,2", "--ranges=2", "--metrics=fid,kid")
    assert sorted(read) == sorted(map(str, run.glob("*.pt")))
    table = capsys.readouterr().out
    assert len(lines(run)) == 3 * 2 * 2 * 3  # kid has a deviation
    assert re.search(r"network-snapshot-1000000\.pt steps 2 seeds 9-17 +\S+", table)
    assert table.count("lowest of 2") == 3 * 2


def test_a_score_of_many_is_that_of_one(run, data):
    gen(run, data, "--ranges=2")
    together = values(run)
    (run / "metrics.jsonl").unlink()
    for network in sorted(run.glob("*.pt")):
        for seeds in ("0-8", "9-17"):
            gen(run, data, f"--seeds={seeds}", pattern=network.name)
    assert values(run) == together


def test_what_is_recorded_is_not_computed_again(run, data, capsys, sampled):
    gen(run, data)
    first, count = capsys.readouterr().out, len(sampled)
    gen(run, data, "--ranges=2")
    assert len(sampled) == count + 3 * 9  # the second range alone
    again = capsys.readouterr().out
    scores = re.findall(r"^(\S+ seeds 0-8: .*)$", first, re.M)
    assert len(scores) == 3 and re.findall(r"^(\S+ seeds 0-8: .*)$", again, re.M) == scores
    assert again.count("Recorded ") == 3
    gen(run, data, "--again")
    assert len(sampled) == count + 6 * 9
    assert len(lines(run)) == 9 and len(values(run)) == 6


@pytest.mark.parametrize("args", [
    ["--steps=3"], ["--seeds=1-9"], ["--seeds=0-9"], ["--class=1"], ["--detector=pixels:2"],
    ["--S_churn=1"], ["--metrics=kid"]])
def test_another_setting_is_another_score(run, data, sampled, args):
    one = {"pattern": "network-snapshot-000010.pt"}
    gen(run, data, **one)
    count = len(sampled)
    gen(run, data, *args, **one)
    assert len(sampled) > count


def test_each_draw_of_rounding_is_a_score_of_its_own(run, data, sampled):
    draws = [["--bits=3"], ["--bits=3", "--rounding-seed=0"], ["--bits=3", "--rounding-seed=1"]]
    for _ in range(2):  # the second time all are recorded
        for args in draws:
            gen(run, data, *args, **ONE)
    assert len(sampled) == 3 * 9
    assert [line["sampler"].get("rounding_seed") for line in lines(run)] == [None, 0, 1]
    assert len({line["value"] for line in lines(run)}) == 3


def test_other_weights_and_another_reference_are_another_score(run, data, sampled, tmp_path):
    one = {"pattern": "network-snapshot-000010.pt"}
    gen(run, data, **one)
    other = write_dataset(tmp_path / "other.zip", num=31)
    gen(run, other, **one)
    assert len(sampled) == 18
    write_snapshot(run / "network-snapshot-000010.pt", seed=7)
    gen(run, data, **one)
    assert len(sampled) == 27
    (tmp_path / "copy.zip").write_bytes(data.read_bytes())  # the same images
    gen(run, tmp_path / "copy.zip", **one)
    assert len(sampled) == 27


def test_a_metric_that_is_missing_is_computed_alone(run, data, capsys):
    one = {"pattern": "network-snapshot-000010.pt"}
    gen(run, data, "--metrics=pr,fid", "--again", **one)
    both = {line["metric"]: line["value"] for line in lines(run)}
    (run / "metrics.jsonl").unlink()
    gen(run, data, "--metrics=fid", **one)
    capsys.readouterr()
    gen(run, data, "--metrics=pr,fid", **one)
    assert [line["metric"] for line in lines(run)] == ["frechet_distance", "precision", "recall"]
    assert {line["metric"]: line["value"] for line in lines(run)} == both
    assert "pixels Frechet distance" in capsys.readouterr().out


@pytest.mark.parametrize("line", [b"{\n", b"[]\n", b'{"metric": "fid"}\n', b"\xff\n",
                                  b'"' + b"[" * 9, b"[" * 100_000 + b"\n"])
def test_damaged_lines_hide_no_score(run, data, sampled, line):
    one = {"pattern": "network-snapshot-000010.pt"}
    gen(run, data, **one)
    path = run / "metrics.jsonl"
    path.write_bytes(line + path.read_bytes())
    gen(run, data, **one)
    assert len(sampled) == (18 if b"\n" not in line else 9)  # what it is joined to is lost


# ---------------------------------------------------------------------------------- what goes wrong


def test_a_damaged_network_does_not_keep_others_from_being_scored(run, data, capsys):
    path = run / "network-snapshot-999000.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SystemExit) as caught:
        fid.main(["gen", f"--network={run / '*.pt'}", f"--ref={data}", "--seeds=0-8", *FAST])
    err = capsys.readouterr().err
    assert caught.value.code == 1
    assert f"Warning: {path} is not scored: " in err
    assert err.rstrip().splitlines()[-1].endswith(
        "1 of 3 networks were not scored, see the warnings above: network-snapshot-999000.pt")
    assert len(values(run)) == 2


def test_a_diverged_network_has_no_score_and_the_others_have(run, data, capsys):
    path = run / "network-snapshot-999000.pt"
    content = checkpoint.load(path)
    for weight in content["ema"].values():
        weight.fill_(torch.nan)
    checkpoint.save(path, content)
    with pytest.raises(SystemExit):
        fid.main(["gen", f"--network={run / '*.pt'}", f"--ref={data}", "--seeds=0-8", *FAST])
    assert "9 of 9 images have values that are not finite" in capsys.readouterr().err
    assert len(values(run)) == 2
    assert not list(run.glob("fid-unfinished*"))


def test_a_flag_that_fits_no_network_is_refused_at_once(run, data, capsys, sampled):
    with pytest.raises(SystemExit) as caught:
        fid.main(["gen", f"--network={run / '*.pt'}", f"--ref={data}", "--class=7", *FAST])
    assert caught.value.code == 2 and not sampled
    assert "--class=7: must be between 0 and 1" in capsys.readouterr().err


# ----------------------------------------------------------------------------- killed and continued


class Stopped(BaseException):
    """Ends a command without a word, as a kill does."""


@pytest.fixture
def stopping(monkeypatch, sampled):
    """Ends a command after so many batches; sums are written after every round."""
    monkeypatch.setattr(scoring, "SAVE_SEC", 0.0)
    original = NetworkSampler.images

    def stop_after(count):
        def counted(self, batches):
            for number, sample in enumerate(original(self, batches)):
                if number == count:
                    raise Stopped
                yield sample

        monkeypatch.setattr(NetworkSampler, "images", counted)

    return stop_after


@pytest.mark.parametrize("metrics", ["fid", "kid,pr", "fid,kid,pr"])
def test_an_unfinished_range_goes_on_where_it_was_stopped(run, data, stopping, sampled, metrics):
    one = {"pattern": "network-snapshot-000010.pt"}
    gen(run, data, f"--metrics={metrics}", **one)
    whole = values(run)
    (run / "metrics.jsonl").unlink()
    for _ in range(3):  # of five batches
        sampled.clear()
        stopping(1)
        with pytest.raises(Stopped):
            gen(run, data, f"--metrics={metrics}", **one)
    assert len(list(run.glob("fid-unfinished-*.npz"))) == 1
    stopping(99)
    sampled.clear()
    gen(run, data, f"--metrics={metrics}", **one)
    assert sampled == [6, 7, 8]
    assert values(run) == whole  # to the bit: the batches are the same
    assert not list(run.glob("fid-unfinished-*"))


def test_another_batch_size_goes_on_too(run, data, stopping, sampled):
    one = {"pattern": "network-snapshot-000010.pt"}
    gen(run, data, **one)
    [whole] = values(run).values()
    (run / "metrics.jsonl").unlink()
    stopping(2)
    with pytest.raises(Stopped):
        gen(run, data, **one)
    stopping(99)
    sampled.clear()
    gen(run, data, "--batch=3", **one)
    assert sampled == [4, 5, 6, 7, 8]
    [value] = values(run).values()
    assert value == pytest.approx(whole, rel=0.01)  # pixels round to other gray levels


def test_unfinished_sums_of_another_draw_of_rounding_are_not_used(run, data, stopping, sampled):
    stopping(2)
    with pytest.raises(Stopped):
        gen(run, data, "--bits=3", "--rounding-seed=0", **ONE)
    stopping(99)
    sampled.clear()
    gen(run, data, "--bits=3", "--rounding-seed=1", **ONE)
    assert sampled == list(range(9))
    sampled.clear()
    gen(run, data, "--bits=3", "--rounding-seed=0", **ONE)
    assert sampled == [4, 5, 6, 7, 8]


def test_damaged_sums_are_not_used(run, data, stopping, sampled, capsys):
    one = {"pattern": "network-snapshot-000010.pt"}
    stopping(2)
    with pytest.raises(Stopped):
        gen(run, data, **one)
    [path] = run.glob("fid-unfinished-*")
    path.write_bytes(path.read_bytes()[:-60])
    stopping(99)
    sampled.clear()
    gen(run, data, **one)
    assert sampled == list(range(9))
    assert re.search(r"Warning: \S+npz: can't be read \(.*\), so this range starts over",
                     capsys.readouterr().err)


def test_sums_of_another_form_are_not_used(tmp_path, capsys):
    class Two:
        name, device, feature_dim = "two", torch.device("cpu"), 2

    def make():
        features = FeatureSet(9, Two(), ["fid", "kid"])
        features.append_features(torch.zeros(0, 2), [])
        return features

    kept = UnfinishedSums(tmp_path, {})
    features = make()
    features.append_features(torch.arange(6.0).reshape(3, 2), range(3))
    kept.save(features, 3)
    [path] = tmp_path.iterdir()
    arrays = dict(np.load(path))
    for name, other in {"bank.features": np.zeros([3, 5], np.float32), "done": np.array(10),
                        "moments.scatter": np.zeros([2])}.items():
        np.savez(path, **{**arrays, name: other})
        found, done = kept.restored(make)
        assert done == 0 and found.moments.count == 0 and "starts over" in capsys.readouterr().err
    np.savez(path, **arrays)
    found, done = kept.restored(make)
    assert done == 3 and torch.equal(found.moments.mean(), torch.tensor([2.0, 3.0]).double())
    assert torch.equal(found.bank.gather(), torch.arange(6.0).reshape(3, 2))


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from metrics import scoring
from sampling.network_sampler import NetworkSampler

scoring.SAVE_SEC, original = 0.0, NetworkSampler.images

def images(self, batches):
    for number, sample in enumerate(original(self, batches)):
        if number == {count}:
            os.kill(os.getpid(), signal.SIGKILL)
        yield sample

NetworkSampler.images = images
import fid
fid.main()
"""


@pytest.mark.scripts
@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_study_survives_kills_and_repeats_no_range(run, data, tmp_path, processes):
    """Killed three times, at each start after two batches of a range; then it runs to its end."""
    args = ["gen", f"--network={run / '*.pt'}", f"--ref={data}", "--seeds=0-8", "--batch=2",
            "--metrics=fid,kid", "--ranges=2", *FAST]
    script = tmp_path / "killed.py"
    for count in (2, 1, 2):
        script.write_text(KILLED.format(root=str(ROOT), count=count))
        codes = [rank.returncode for rank in run_ranks(script, *args, processes=processes)]
        assert -signal.SIGKILL in codes
    script.write_text(KILLED.format(root=str(ROOT), count=-1))
    for rank in run_ranks(script, *args, processes=processes):
        assert rank.returncode == 0, rank.stderr
    found = [(line["network"], line["seeds"], line["metric"]) for line in lines(run)]
    assert len(found) == len(set(found)) == 3 * 2 * 3
    survived = values(run)
    (run / "metrics.jsonl").unlink()
    for rank in run_ranks(ROOT / "fid.py", *args, processes=processes):
        assert rank.returncode == 0, rank.stderr
    assert survived.keys() == values(run).keys()
    assert list(survived.values()) == pytest.approx(list(values(run).values()), rel=1e-9)
    assert not list(run.glob("fid-unfinished-*"))


# ------------------------------------------------------------------------------------ kept features


ONE = {"pattern": "network-snapshot-000010.pt"}


def by_metric(path):
    return {line["metric"]: line["value"]
            for line in map(json.loads, path.read_text().splitlines())}


def refused(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        fid.main(list(map(str, args)))
    assert caught.value.code
    [line] = [line for line in capsys.readouterr().err.splitlines()
              if not line.startswith("Warning:")]
    return line


def test_another_metric_of_kept_features_needs_no_new_samples(run, data, sampled, tmp_path, capsys):
    gen(run, data, "--metrics=fid,kid,pr", **ONE)
    direct = by_metric(run / "metrics.jsonl")
    (run / "metrics.jsonl").unlink()
    file = f"--features={tmp_path / 'f.npz'}"
    gen(run, data, "--metrics=fid", file, **ONE)
    count = len(sampled)
    gen(run, data, "--metrics=fid,kid", file, **ONE)
    fid.main(["calc", f"--images={tmp_path / 'f.npz'}", f"--ref={data}", "--count=9",
              "--metrics=fid,pr", "--device=cpu", "--detector=pixels",
              f"--out={tmp_path / 'calc.jsonl'}"], standalone_mode=False)
    assert len(sampled) == count
    found = by_metric(run / "metrics.jsonl") | by_metric(tmp_path / "calc.jsonl")
    assert found == pytest.approx(direct, rel=1e-9)
    [first, *_] = lines(run)
    [calculated, *_] = map(json.loads, (tmp_path / "calc.jsonl").read_text().splitlines())
    assert {**calculated, "date": 0, "value": 0} == {**first, "date": 0, "value": 0}


def test_a_recorded_score_without_its_features_is_sampled_and_not_recorded_again(
        run, data, sampled, tmp_path):
    gen(run, data, **ONE)
    gen(run, data, f"--features={tmp_path / 'f.npz'}", **ONE)
    assert len(sampled) == 18 and len(lines(run)) == 1
    kept = np.load(tmp_path / "f.npz")["features"]
    assert kept.shape == (9, 3 * 8 * 8) and np.abs(kept).max() <= 1


def test_features_of_other_images_are_refused_and_replaced_when_asked(run, data, tmp_path, capsys):
    file = f"--features={tmp_path / 'f.npz'}"
    gen(run, data, file, **ONE)
    before = (tmp_path / "f.npz").read_bytes()
    capsys.readouterr()
    args = ["gen", f"--network={run / 'network-snapshot-000010.pt'}", f"--ref={data}", file]
    for other in (["--seeds=1-9"], ["--seeds=0-8", "--steps=3"],
                  ["--seeds=0-8", "--bits=3", "--rounding-seed=0"]):
        assert re.search("f.npz: holds features of images with other seeds.*--again",
                         refused(capsys, *args, *FAST, *other))
    assert (tmp_path / "f.npz").read_bytes() == before
    gen(run, data, file, "--seeds=1-9", "--again", **ONE)
    assert (tmp_path / "f.npz").read_bytes() != before


def test_features_of_several_scores_go_to_a_folder(run, data, sampled, tmp_path, capsys):
    folder = tmp_path / "features"
    gen(run, data, "--ranges=2", f"--features={folder}")
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 6 and re.fullmatch(
        "run_network-snapshot-000010_0-8_[0-9a-f]{8}.npz", names[0])
    count = len(sampled)
    gen(run, data, "--ranges=2", f"--features={folder}", "--metrics=kid")
    assert len(sampled) == count
    capsys.readouterr()
    common = ["gen", f"--network={run / '*.pt'}", f"--ref={data}", "--seeds=0-8", *FAST]
    assert "must be a folder, because there are 3 scores" in refused(
        capsys, *common, f"--features={tmp_path / 'f.npz'}")
    [*_, one] = sorted(map(str, run.glob("*.pt")))
    assert "must be a file with extension .npz" in refused(
        capsys, "gen", f"--network={one}", *common[2:], f"--features={folder}")


def test_features_of_images_are_kept_too(data, tmp_path):
    args = ["calc", f"--ref={data}", "--device=cpu", "--workers=0", "--detector=pixels",
            "--metrics=fid,kid"]
    images = write_dataset(tmp_path / "images.zip", num=20)
    fid.main([*args, f"--images={images}", "--count=20", f"--out={tmp_path / 'a.jsonl'}",
              f"--features={tmp_path / 'f.npz'}"], standalone_mode=False)
    fid.main([*args, f"--images={tmp_path / 'f.npz'}", "--count=20",
              f"--out={tmp_path / 'b.jsonl'}"], standalone_mode=False)
    assert by_metric(tmp_path / "a.jsonl") == pytest.approx(by_metric(tmp_path / "b.jsonl"),
                                                            rel=1e-12)


def damaged_features(path, **changes):
    arrays = dict(np.load(path)) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize("damage, words", [
    (lambda path: path.write_bytes(path.read_bytes()[:3000]), "truncated or damaged|not an .npz"),
    (lambda path: damaged_features(path, features=np.zeros([9, 2, 2], np.float32)), "has shape"),
    (lambda path: damaged_features(path, features=np.zeros([9, 192])), None),
    (lambda path: damaged_features(path, features=np.full([9, 192], np.nan)), "not finite"),
    (lambda path: damaged_features(path, features=np.array([None])), "not a features file"),
    (lambda path: damaged_features(path, facts=np.array("{}")), "not a features file"),
    (lambda path: damaged_features(path, facts=np.array("[" * 100_000)), "not a features file"),
    (lambda path: damaged_features(path, detector=np.array("other")), "features of detector other"),
    (lambda path: np.savez_compressed(path, **np.load(path)), "compressed"),
])
def test_damaged_features_are_refused(run, data, tmp_path, capsys, damage, words):
    gen(run, data, f"--features={tmp_path / 'f.npz'}", **ONE)
    damage(tmp_path / "f.npz")
    capsys.readouterr()
    args = ["calc", f"--images={tmp_path / 'f.npz'}", f"--ref={data}", "--count=9", "--device=cpu",
            "--detector=pixels"]
    if words is None:
        fid.main(args, standalone_mode=False)
    else:
        assert re.search(words, refused(capsys, *args))


def test_kept_features_are_of_a_number(run, data, tmp_path, capsys):
    gen(run, data, f"--features={tmp_path / 'f.npz'}", **ONE)
    capsys.readouterr()
    args = ["calc", f"--images={tmp_path / 'f.npz'}", f"--ref={data}", "--detector=pixels"]
    assert "features of 9 images, but --count=50000; give --count=9" in refused(capsys, *args)
    assert "leave --features out" in refused(capsys, *args, f"--features={tmp_path / 'g.npz'}")


# ------------------------------------------------------------------------- intervals and classes


def test_an_interval_is_printed_recorded_and_found_again(run, data, sampled, capsys):
    gen(run, data, **ONE)
    capsys.readouterr()
    gen(run, data, "--bootstrap=50", **ONE)
    first = capsys.readouterr().out
    count = len(sampled)
    gen(run, data, "--bootstrap=50", **ONE)
    gen(run, data, **ONE)
    assert len(sampled) == count == 18
    shown = re.search(r"95% interval (\S+) to (\S+), standard error (\S+)", first)
    assert shown[0] in capsys.readouterr().out
    plain, line = lines(run)
    assert "interval" not in plain and line["value"] == pytest.approx(plain["value"], rel=1e-9)
    low, high = line["interval"]
    assert low < line["value"] < high and 0 < line["std_error"] < high - low
    assert (line["bootstrap"], float(shown[1])) == (50, pytest.approx(low, rel=1e-5))
    gen(run, data, "--bootstrap", **ONE)
    assert len(sampled) == 27 and lines(run)[-1]["bootstrap"] == 1000


def test_the_interval_is_that_of_the_features(run, data, tmp_path):
    from metrics.bootstrap import bootstrap_frechet
    gen(run, data, "--bootstrap=50", f"--features={tmp_path / 'f.npz'}", **ONE)
    fid.main(["ref", f"--data={data}", f"--dest={tmp_path / 'r.npz'}", "--detector=pixels",
              "--device=cpu", "--workers=0"], standalone_mode=False)
    reference = np.load(tmp_path / "r.npz")
    expected = bootstrap_frechet(torch.from_numpy(np.load(tmp_path / "f.npz")["features"]),
                                 reference["mu"], reference["sigma"], draws=50)
    [line] = lines(run)
    assert line["interval"] == pytest.approx([expected.low, expected.high], rel=1e-6)
    assert line["std_error"] == pytest.approx(expected.std_error, rel=1e-6)


def only_class(source, dest, number):
    """Writes the images of one class of a ZIP."""
    import zipfile
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(dest, "w") as other:
        for name, label in json.loads(archive.read("dataset.json"))["labels"]:
            if label == number:
                other.writestr(name, archive.read(name))
    return dest


@pytest.mark.long
def test_a_class_is_scored_as_a_data_set_of_it_alone(data, tmp_path, capsys):
    images = write_dataset(tmp_path / "images.zip", num=21)
    out = tmp_path / "m.jsonl"
    args = ["--device=cpu", "--workers=0", "--detector=pixels", "--metrics=fid,pr", f"--out={out}"]
    fid.main(["calc", f"--images={images}", f"--ref={data}", "--count=21", "--per-class", *args],
             standalone_mode=False)
    table = capsys.readouterr().out
    records = list(map(json.loads, out.read_text().splitlines()))
    found = {(line["of_class"], line["metric"]): line["value"]
             for line in records if "of_class" in line}
    assert {k for k, _ in found} == {0, 1, "mean"} and len(records) == 12
    for number in (0, 1):
        out.unlink()
        fid.main(["calc", f"--images={only_class(images, tmp_path / 'a.zip', number)}",
                  f"--ref={only_class(data, tmp_path / 'b.zip', number)}",
                  f"--count={11 - number}", *args], standalone_mode=False)
        for metric, value in by_metric(out).items():
            assert found[number, metric] == pytest.approx(value, rel=1e-6, abs=1e-9)
    for metric in by_metric(out):
        assert found["mean", metric] == pytest.approx(
            (found[0, metric] + found[1, metric]) / 2, rel=1e-12)
    assert re.search(r"^class +pixels Frechet distance +precision +recall$", table, re.M)
    mean = re.escape(f"{found['mean', 'frechet_distance']:.5g}")
    assert re.search(f"^mean +{mean}", table, re.M)


@pytest.mark.long
def test_classes_of_samples_are_those_that_are_written(run, data, sampled, tmp_path, capsys):
    network = run / "network-snapshot-000010.pt"
    gen(run, data, "--seeds=0-299", "--batch=64", "--per-class", **ONE)  # classes in two pieces
    before, count = capsys.readouterr().out, len(sampled)
    gen(run, data, "--seeds=0-299", "--batch=64", "--per-class", **ONE)
    assert len(sampled) == count
    mean = re.search(r"^mean .*$", before, re.M)[0]
    assert mean.split() == re.search(r"^mean .*$", capsys.readouterr().out, re.M)[0].split()
    generate.main([f"--network={network}", f"--outdir={tmp_path / 'out'}", "--seeds=0-299",
                   "--batch=64", "--steps=2", "--device=cpu"], standalone_mode=False)
    out = tmp_path / "m.jsonl"
    fid.main(["calc", f"--images={tmp_path / 'out'}", f"--ref={data}", "--count=300",
              "--batch=64", "--per-class", "--device=cpu", "--workers=0", "--detector=pixels",
              f"--out={out}"], standalone_mode=False)
    calculated = {line.get("of_class"): line["value"]
                  for line in map(json.loads, out.read_text().splitlines())}
    direct = {line.get("of_class"): line["value"] for line in lines(run)}
    assert calculated == pytest.approx(direct, rel=1e-9)


def test_scores_of_classes_are_not_taken_for_those_of_all(run, data, sampled):
    gen(run, data, "--seeds=0-19", "--per-class", **ONE)
    whole = [line["value"] for line in lines(run) if "of_class" not in line]
    count = len(sampled)
    (run / "metrics.jsonl").write_text("".join(
        json.dumps(line) + "\n" for line in lines(run) if "of_class" in line))
    gen(run, data, "--seeds=0-19", **ONE)
    assert len(sampled) == count + 20
    assert [line["value"] for line in lines(run) if "of_class" not in line] == pytest.approx(
        whole, rel=1e-9)


@pytest.mark.parametrize("args, words", [
    (["--per-class", "--ref=plain.zip"], "--ref=.*plain.zip has no classes"),
    (["--per-class", "--network=plain.pt"], "plain.pt has no classes; leave --per-class out"),
    (["--bootstrap=39"], "39 is not in the range x>=40"),
    (["--bootstrap", "--metrics=kid"], "--bootstrap with --metrics=kid: needs fid"),
])
def test_what_has_no_classes_or_interval_is_refused(run, data, tmp_path, capsys, args, words):
    write_dataset(tmp_path / "plain.zip", classes=0)
    write_snapshot(tmp_path / "plain.pt", label_dim=0)
    given = {"--network": f"--network={run / 'network-snapshot-000010.pt'}",
             "--ref": f"--ref={data}"}
    for arg in args:
        name, _, value = arg.partition("=")
        given[name] = f"{name}={tmp_path / value}" if name in given else arg
    with pytest.raises(SystemExit) as caught:
        fid.main(["gen", *given.values(), "--seeds=0-9", *FAST])
    assert caught.value.code and re.search(words, capsys.readouterr().err)


def test_the_first_network_may_be_the_damaged_one(run, data, capsys):
    path = run / "network-snapshot-000010.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SystemExit) as caught:
        fid.main(["gen", f"--network={run / '*.pt'}", f"--ref={data}", "--seeds=0-8", *FAST])
    assert caught.value.code == 1 and len(values(run)) == 2
    assert "1 of 3 networks were not scored" in capsys.readouterr().err


def test_a_reference_that_does_not_do_is_told_once(run, tmp_path, capsys):
    (tmp_path / "bad.npz").write_bytes(b"no reference")
    with pytest.raises(SystemExit):
        fid.main(["gen", f"--network={run / '*.pt'}", f"--ref={tmp_path / 'bad.npz'}",
                  "--seeds=0-8", *FAST])
    [line] = capsys.readouterr().err.splitlines()
    assert "bad.npz" in line


# ------------------------------------------------------------------------ the same score or another


def test_another_configuration_of_the_same_weights_is_another_score(run, data, sampled):
    one = run / "network-snapshot-000010.pt"
    gen(run, data, **ONE)
    with_network(one, sigma_data=1.0)
    gen(run, data, **ONE)
    assert len(sampled) == 18
    first, second = (line["value"] for line in lines(run))
    assert first != second


def test_other_frequencies_of_classes_are_another_score(tmp_path, data, sampled):
    for name, counts in (("a", [9, 1]), ("b", [1, 9])):
        write_snapshot(tmp_path / f"network-snapshot-{name}.pt", dataset={"class_counts": counts})
    gen(tmp_path, data, "--class=data")
    assert len(sampled) == 18 and len(lines(tmp_path)) == 2


def test_the_same_weights_under_two_names_are_scored_once(run, data, sampled):
    one = run / "network-snapshot-000010.pt"
    (run / "network-snapshot-000011.pt").write_bytes(one.read_bytes())
    gen(run, data, pattern="network-snapshot-00001?.pt")
    assert len(sampled) == 9 and len(lines(run)) == 1


def test_the_interval_of_any_record_is_found(run, data, sampled):
    gen(run, data, "--bootstrap=50", **ONE)
    gen(run, data, "--bootstrap=60", **ONE)
    gen(run, data, "--again", **ONE)
    count = len(sampled)
    gen(run, data, "--bootstrap=50", **ONE)
    gen(run, data, "--bootstrap=60", **ONE)
    assert len(sampled) == count == 27


@pytest.mark.parametrize("change", [
    {"interval": None}, {"interval": [1]}, {"interval": ["a", 2]}, {"std_error": None},
    {"value": float("nan")}, {"value": 10**400}, {"value": True}, {"value": "1"}])
def test_a_record_that_was_edited_is_not_taken(run, data, sampled, change):
    gen(run, data, "--bootstrap=50", **ONE)
    [line] = lines(run)
    (run / "metrics.jsonl").write_text(json.dumps(line | change) + "\n")
    gen(run, data, "--bootstrap=50", **ONE)
    assert len(sampled) == 18


def test_each_metric_has_the_classes_that_it_has_images_for(run, tmp_path, capsys):
    """What else is asked for does not change the mean over classes."""
    more = write_dataset(tmp_path / "more.zip", num=7)  # pr has no images enough of class 1
    for name, metrics in (("both", "fid,pr"), ("one", "fid")):
        gen(run, more, "--seeds=0-39", "--per-class", f"--metrics={metrics}",
            f"--out={tmp_path / name}.jsonl", **ONE)
    both, one = (
        {(line["of_class"], line["metric"]): line for line in map(
            json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())
         if "of_class" in line} for name in ("both", "one"))
    for key, line in one.items():
        assert both[key]["value"] == pytest.approx(line["value"], rel=1e-9)
    assert both["mean", "frechet_distance"]["classes"] == "0-1"


def test_all_classes_of_a_recorded_score_are_shown_again(run, data, capsys):
    gen(run, data, "--seeds=0-39", "--per-class", "--metrics=fid,kid", **ONE)
    before = capsys.readouterr().out
    gen(run, data, "--seeds=0-39", "--per-class", "--metrics=fid,kid", **ONE)
    table = re.compile(r"^class .*?^mean [^\n]*", re.M | re.S)
    assert table.search(before)[0] == table.search(capsys.readouterr().out)[0]


def test_a_metric_without_enough_images_of_a_class_is_refused_before_sampling(
        run, data, sampled, capsys):
    assert "no class has 6 generated and 6 real images, which dc needs" in refused(
        capsys, "gen", f"--network={run / 'network-snapshot-000010.pt'}", f"--ref={data}",
        "--seeds=0-7", "--per-class", "--metrics=dc", *FAST)
    assert not sampled


def test_images_of_generate_and_samples_are_the_same_score(run, data, sampled, tmp_path):
    """Features that were kept of written images serve the network, and the other way round."""
    network = run / "network-snapshot-000010.pt"
    generate.main([f"--network={network}", f"--outdir={tmp_path / 'out'}", "--seeds=0-8",
                   "--batch=2", "--steps=2", "--subdirs", "--device=cpu"], standalone_mode=False)
    fid.main(["calc", f"--images={tmp_path / 'out'}", f"--ref={data}", "--count=9", "--device=cpu",
              "--workers=0", "--detector=pixels", f"--features={tmp_path / 'f.npz'}",
              f"--out={run / 'metrics.jsonl'}"], standalone_mode=False)
    count = len(sampled)
    gen(run, data, f"--features={tmp_path / 'f.npz'}", **ONE)
    gen(run, data, "--metrics=kid", f"--features={tmp_path / 'f.npz'}", **ONE)
    assert len(sampled) == count and len(lines(run)) == 3


# ------------------------------------------------------------------------------- what could be lost


def test_sums_are_kept_until_the_score_is_recorded(run, data, stopping, sampled, monkeypatch):
    def killed(*_):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "evaluate", killed)
        with pytest.raises(Stopped):
            gen(run, data, **ONE)
    assert len(sampled) == 9
    gen(run, data, **ONE)
    assert len(sampled) == 9 and len(lines(run)) == 1
    assert not list(run.glob("fid-unfinished*"))


def test_sums_serve_other_metrics_if_they_hold_what_these_need(run, data, stopping, sampled):
    stopping(2)
    with pytest.raises(Stopped):
        gen(run, data, "--metrics=fid,kid", **ONE)
    stopping(99)
    sampled.clear()
    gen(run, data, "--metrics=fid", **ONE)
    assert sampled == list(range(4, 9)) and not list(run.glob("fid-unfinished*"))
    stopping(2)
    with pytest.raises(Stopped):
        gen(run, data, "--metrics=fid", "--again", **ONE)
    stopping(99)
    sampled.clear()
    gen(run, data, "--metrics=kid", **ONE)
    assert sampled == list(range(9)) and not list(run.glob("fid-unfinished*"))


def test_scores_without_a_place_are_refused_before_sampling(run, data, sampled, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    one = ["gen", f"--network={run / 'network-snapshot-000010.pt'}", f"--ref={data}", "--seeds=0-8",
           *FAST]
    for out in (tmp_path, tmp_path / "file" / "m.jsonl"):
        assert re.search(f"^Error: {out}: .*scores can't be recorded; give another file as --out",
                         refused(capsys, *one, f"--out={out}"))
    assert not sampled


def test_scores_that_get_lost_end_with_an_error_and_are_printed(run, data, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(score_log, "append_line", full)
    with pytest.raises(SystemExit) as caught:
        fid.main(["gen", f"--network={run / 'network-snapshot-000010.pt'}", f"--ref={data}",
                  "--seeds=0-8", *FAST])
    out, err = capsys.readouterr()
    assert caught.value.code == 1 and re.search(r"^pixels Frechet distance: [\d.]+$", out, re.M)
    assert "not all scores could be recorded" in err


def test_features_that_find_no_room_lose_no_score(run, data, capsys, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_files.np, "savez", full)
    line = refused(capsys, "gen", f"--network={run / 'network-snapshot-000010.pt'}",
                   f"--ref={data}", "--seeds=0-8", f"--features={tmp_path / 'f.npz'}", *FAST)
    assert re.search(r"--features=\S+f.npz: can't be written \(No space left on device\), but "
                     "the score is recorded", line)
    assert len(lines(run)) == 1


def test_a_flag_that_does_not_fit_a_later_network_leaves_that_one_out(run, data, capsys):
    other = write_snapshot(run / "network-snapshot-000300.pt", label_dim=0)
    with pytest.raises(SystemExit) as caught:
        fid.main(["gen", f"--network={run / '*.pt'}", f"--ref={data}", "--seeds=0-8", "--class=1",
                  *FAST])
    assert caught.value.code == 1 and len(values(run)) == 3
    assert f"Warning: {other} is not scored: --class=1: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.scripts
def test_a_network_that_one_process_refuses_is_left_out_by_all(run, data):
    """Only rank 0 has the statistics of a reference, and so can say that images don't fit."""
    write_snapshot(run / "network-snapshot-000300.pt", shape=(1, 8, 8))
    ranks = run_ranks("fid.py", "gen", f"--network={run / '*.pt'}", f"--ref={data}",
                      "--seeds=0-8", "--batch=2", *FAST, processes=2)
    assert 1 in {rank.returncode for rank in ranks}
    assert "1 of 4 networks were not scored" in "".join(rank.stderr for rank in ranks)
    assert len(values(run)) == 3


def test_a_folder_of_features_is_scored_as_a_whole(run, data, tmp_path, capsys):
    gen(run, data, "--ranges=2", f"--features={tmp_path / 'features'}")
    direct = sorted(line["value"] for line in lines(run))
    capsys.readouterr()
    args = ["calc", f"--images={tmp_path / 'features'}", f"--ref={data}", "--count=9",
            "--device=cpu"]
    assert re.search(r"features of detector pixels; give --detector=pixels instead of inception",
                     refused(capsys, *args))  # before weights of Inception are looked for
    fid.main([*args, "--detector=pixels", f"--out={tmp_path / 'm.jsonl'}"], standalone_mode=False)
    found = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert sorted(line["value"] for line in found) == pytest.approx(direct, rel=1e-9)
    assert {line["network"] for line in found} == {str(path) for path in run.glob("*.pt")}


def test_what_goes_on_or_is_sampled_again_is_told(run, data, stopping, tmp_path, capsys):
    stopping(2)
    with pytest.raises(Stopped):
        gen(run, data, **ONE)
    stopping(99)
    gen(run, data, **ONE)
    assert "Resume     seeds 0-8: 4 of 9 are done" in capsys.readouterr().out
    gen(run, data, f"--features={tmp_path / 'f.npz'}", **ONE)
    assert re.search(r"seeds 0-8: not in \S+f.npz yet, so its images are sampled again",
                     capsys.readouterr().out)


def test_a_part_of_the_images_is_told(data, tmp_path, capsys):
    images = write_dataset(tmp_path / "images.zip", num=21)
    fid.main(["calc", f"--images={images}", f"--ref={data}", "--count=20", "--device=cpu",
              "--workers=0", "--detector=pixels", f"--out={tmp_path / 'm.jsonl'}"],
             standalone_mode=False)
    assert "20 of 21 images are scored, chosen at random by --seed=0" in capsys.readouterr().err


@pytest.mark.parametrize("num, words", [
    (9, "Warning: classes 1 have too few generated or real images for dc and are left out of it"),
    (5, "no class has 6 generated and 6 real images, which dc needs")])
def test_classes_of_images_that_are_too_few_are_told_before_features_are_computed(
        data, tmp_path, capsys, monkeypatch, num, words):
    from metrics import metrics as metrics_module
    images = write_dataset(tmp_path / "images.zip", num=num + 2)  # 6 and 5, or 4 and 3, of classes
    computed, original = [], metrics_module.dataset_features
    monkeypatch.setattr(metrics_module, "dataset_features", lambda dataset, *args, **how: (
        computed.append(str(dataset.path)), original(dataset, *args, **how))[1])
    with pytest.raises(SystemExit) as caught:
        fid.main(["calc", f"--images={images}", f"--ref={data}", f"--count={num + 2}",
                  "--per-class", "--metrics=dc", "--device=cpu", "--workers=0",
                  "--detector=pixels", f"--out={tmp_path / 'm.jsonl'}"])
    assert words in capsys.readouterr().err
    assert bool(caught.value.code) == (num == 5) and (str(images) in computed) == (num == 9)
