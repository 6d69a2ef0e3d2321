"""Every key of metrics.jsonl: what sets it, and what readers decide by it."""

import json

import pytest
from snapshots import write_snapshot
from tiny import write_dataset

import fid
import generate
from metrics import detectors
from reports.comparison import ScoreGroup
from reports.run_record import read_scores


class Brightness(detectors.Pixels):
    """Features of its own, with weights of its own."""

    name, distance_name, weights_sha256 = "brightness", "distance of brightness", "ab" * 32

    def __call__(self, images):
        return super().__call__(images)[:, ::7]


# By command and key: the arguments that change it, and the keys that change with it.
CALC = {
    "value": (["--seed=1"], {"choice_seed"}),
    "metric": (["--metrics=kid"], {"value"}),
    "images": (["--images=copy.zip"], set()),
    "num": (["--num=20"], {"value"}),
    "seeds": (["--images=generated"], {"images", "value", "chosen_from", "sampler"}),
    "sampler": (["--images=generated"], {"images", "value", "chosen_from", "seeds"}),
    "chosen_from": (["--images=longer.zip"], {"images", "value"}),
    "choice_seed": (["--seed=1"], {"value"}),
    "detector": (["--detector=brightness"], {"value", "detector_sha256"}),
    "detector_sha256": (["--detector=brightness"], {"value", "detector"}),
    "reference": (["--ref=ref-copy.zip"], set()),
    "reference_sha256": (["--ref=longer.zip"], {"reference", "value", "reference_num"}),
    "reference_num": (["--ref=longer.zip"], {"reference", "value", "reference_sha256"}),
}
GEN = {
    "value": (["--seeds=1-8"], {"seeds"}),
    "network": (["--network=copy.pt"], set()),
    "num": (["--seeds=0-8"], {"seeds", "value"}),
    "seeds": (["--seeds=1-8"], {"value"}),
    "sampler": (["--steps=3"], {"value"}),
}
KEYS_OF_ALL = {"metric", "value", "num", "detector", "detector_sha256", "reference",
               "reference_sha256", "reference_num", "seeds", "sampler", "date"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("score")
    data = write_dataset(root / "images.zip", num=30)
    (root / "copy.zip").write_bytes(data.read_bytes())
    write_dataset(root / "longer.zip", num=31)
    for name in ("ref.zip", "ref-copy.zip"):
        write_dataset(root / name, num=40)
    network = write_snapshot(root / "net.pt")
    (root / "copy.pt").write_bytes(network.read_bytes())
    generate.main([f"--network={network}", f"--outdir={root / 'generated'}", "--steps=2",
                   "--seeds=0-25", "--device=cpu"], standalone_mode=False)
    return root


def score(folder, tmp_path, command, *args):
    """Returns the line that a command records; of two arguments of one name the last counts."""
    def path(arg):
        flag, value = arg.split("=")
        return f"{flag}={folder / value}" if (folder / value).exists() else arg

    out = tmp_path / "metrics.jsonl"
    out.unlink(missing_ok=True)
    fid.main([command, *map(path, args), f"--out={out}", "--device=cpu", "--workers=0"],
             standalone_mode=False)
    return json.loads(out.read_text().splitlines()[0])


def calc(folder, tmp_path, *args):
    return score(folder, tmp_path, "calc", "--images=images.zip", "--ref=ref.zip", "--num=25",
                 "--detector=pixels", *args)


def gen(folder, tmp_path, *args):
    network = [] if args and args[0].startswith("--network") else ["--network=net.pt"]
    return score(folder, tmp_path, "gen", *network, "--ref=ref.zip", "--seeds=0-7", "--steps=2",
                 "--detector=pixels", *args)


def assert_changes(before, after, key, others):
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed - {"date"} == {key} | others


@pytest.mark.long
@pytest.mark.parametrize("key", CALC)
def test_a_key_of_a_score_of_images_is_set_by(key, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(detectors.DETECTORS, "brightness", Brightness)
    args, others = CALC[key]
    before = calc(folder, tmp_path)
    assert before.keys() == KEYS_OF_ALL | {"images", "chosen_from", "choice_seed"}
    assert_changes(before, calc(folder, tmp_path, *args), key, others)


@pytest.mark.long
@pytest.mark.parametrize("key", GEN)
def test_a_key_of_a_score_of_a_network_is_set_by(key, folder, tmp_path):
    args, others = GEN[key]
    before = gen(folder, tmp_path)
    assert before.keys() == KEYS_OF_ALL | {"network"}
    assert_changes(before, gen(folder, tmp_path, *args), key, others)


@pytest.mark.parametrize("key", sorted(KEYS_OF_ALL | {"network", "kimg"}))
def test_a_reader_decides_by_the_key(key, tmp_path):
    line = {"metric": "fid", "value": 2.0, "network": "network-snapshot-000100.pt", "num": 8,
            "seeds": "0-7", "sampler": {"D": 2.5, "num_steps": 18, "guidance": 2}, "kimg": 7,
            "detector": "inception", "detector_sha256": "ab", "reference": "ref.npz",
            "reference_sha256": "cd", "reference_num": 40, "date": "2026-01-01T00:00:00+0000"}
    other = {"sampler": {"D": 2.5, "num_steps": 18, "guidance": 3}, "num": 9, "kimg": 8,
             "value": 3.0}.get(key, "other")

    def read(record):
        (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        [found] = read_scores(tmp_path)
        return found

    before, after = read(line), read({**line, key: other})
    # The weights' digest is in the detector's name, unless it is the published ones'.
    is_to_be_read_only = key in {"date", "detector_sha256", "reference_num"}
    assert (before == after) is is_to_be_read_only
    is_compared = key not in {"metric", "num", "sampler", "detector", "reference_sha256"}
    assert (ScoreGroup.of(before) == ScoreGroup.of(after)) is is_compared


def test_seed_ranges_follow_each_other_whatever_their_gaps(folder, tmp_path):
    """No seed is scored twice: each range begins after the last seed of the one before."""
    out = tmp_path / "metrics.jsonl"
    fid.main(["gen", f"--network={folder / 'net.pt'}", f"--ref={folder / 'ref.zip'}",
              "--seeds=0,2,5-6", "--ranges=3", "--steps=1", "--detector=pixels", "--device=cpu",
              "--workers=0", f"--out={out}"], standalone_mode=False)
    assert [json.loads(line)["seeds"] for line in out.read_text().splitlines()] == [
        "0,2,5-6", "7,9,12-13", "14,16,19-20"]
