"""Reference statistics of EDM2: plain data in a pickle, of one detector or several."""

import hashlib
import json
import os
import pickle

import numpy as np
import pytest

import fid
from metrics import references
from metrics.references import load_reference

RNG = np.random.default_rng(0)


def statistics(dim, dtype=np.float64):
    x = RNG.normal(size=[3 * dim, dim])
    return {"mu": x.mean(0).astype(dtype), "sigma": np.cov(x.T).astype(dtype)}


WHOLE = {"num_images": 50_000, "fid": statistics(8), "fd_dinov2": statistics(5)}


def write(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol))
    return str(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("detector, key", [("inception", "fid"), ("dinov2", "fd_dinov2")])
def test_the_entry_of_the_detector_is_taken(tmp_path, protocol, detector, key):
    path = write(tmp_path / "img512.pkl", WHOLE, protocol)
    found = load_reference(path, detector)
    assert np.array_equal(found.mu, WHOLE[key]["mu"])
    assert np.array_equal(found.sigma, WHOLE[key]["sigma"])
    assert (found.detector, found.count, found.image_shape) == (detector, 50_000, None)
    assert found.digest == hashlib.sha256((tmp_path / "img512.pkl").read_bytes()).hexdigest()


def test_single_precision_becomes_double_and_the_count_may_be_missing(tmp_path):
    content = {"fid": statistics(4, np.float32)}
    found = load_reference(write(tmp_path / "a.pkl", content))
    assert found.sigma.dtype == np.float64 and found.count is None
    assert np.array_equal(found.sigma, content["fid"]["sigma"])


@pytest.mark.parametrize("content, detector, text", [
    (WHOLE, "pixels", "holds statistics of inception and dinov2, but not of detector pixels; give "
                      "--detector=inception or --detector=dinov2"),
    ({"fid": WHOLE["fid"]}, "dinov2", "holds statistics of inception, but not of detector dinov2; "
                                      "give --detector=inception"),
])
def test_a_detector_that_the_file_is_not_of_is_named_with_others(tmp_path, content, detector, text):
    with pytest.raises(ValueError, match=text):
        load_reference(write(tmp_path / "a.pkl", content), detector)


class Evil:
    def __reduce__(self):
        return os.system, ("touch boom",)


@pytest.mark.parametrize("content, text", [
    (Evil(), "posix.system"), ({"fid": Evil()}, "posix.system"),
    ([], "without statistics called fid or fd_dinov2"), ({"ema": 1}, "without statistics"),
    ({"fid": {"mu": WHOLE["fid"]["mu"]}}, "fid has no arrays mu and sigma"),
    ({"fid": [1]}, "fid has no arrays"), ({"fid": {"mu": 1, "sigma": 2}}, "fid has no arrays"),
    ({"fid": WHOLE["fid"] | {"sigma": np.eye(3)}}, r"sigma \[3, 3\]"),
    ({"fid": WHOLE["fid"] | {"sigma": -np.eye(8)}}, "not a covariance"),
    ({"fid": {"mu": np.zeros(2, np.int64), "sigma": np.eye(2)}}, "mu has type int64"),
    ({"fid": {"mu": np.array([0, np.nan]), "sigma": np.eye(2)}}, "not finite"),
    ({"fid": {"mu": np.array([None]), "sigma": np.eye(1)}}, "isn't of numbers"),
    ({"num_images": -1, "fid": WHOLE["fid"]}, "num_images"),
    ({"num_images": "many", "fid": WHOLE["fid"]}, "num_images"),
])
def test_other_pickles_are_refused_in_one_line_and_nothing_is_run(tmp_path, monkeypatch, content,
                                                                 text):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.pkl", content)
    with pytest.raises(ValueError, match=f"a.pkl: not reference statistics: .*{text}") as caught:
        load_reference(path)
    assert "\n" not in str(caught.value) and not (tmp_path / "boom").exists()


@pytest.mark.parametrize("protocol", [0, 1])
def test_a_pickle_of_an_old_protocol_is_called_so(tmp_path, protocol):
    text = "a.pkl: not reference statistics: .* pickle of protocol 2 or later; .*protocol=4"
    with pytest.raises(ValueError, match=text):
        load_reference(write(tmp_path / "a.pkl", WHOLE, protocol))


def test_a_cut_file_is_refused(tmp_path):
    path = tmp_path / "a.pkl"
    whole = pickle.dumps(WHOLE)
    for length in (1, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="a.pkl: not reference statistics"):
            load_reference(str(path))


def test_a_file_of_another_size_than_statistics_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "_MAX_PICKLE_BYTES", 100)
    with pytest.raises(ValueError, match="a pickle of .* bytes, at most 100"):
        load_reference(write(tmp_path / "a.pkl", WHOLE))


def test_scores_against_a_pickle_are_those_against_an_npz(tmp_path, invoke, dataset_zip,
                                                          monkeypatch):
    """With the entry of Inception's place given to pixels, whose features need no weights."""
    monkeypatch.setattr(references, "_PICKLED", {"fid": "pixels"})
    content = {"num_images": 4000, "fid": statistics(192)}
    write(tmp_path / "ref.pkl", content)
    np.savez(tmp_path / "ref.npz", detector="pixels", count=4000, **content["fid"])
    values = []
    for name in ("ref.pkl", "ref.npz"):
        done = invoke(fid.main, "calc", f"--images={dataset_zip}", f"--ref={tmp_path}/{name}",
                      "--count=40", "--detector=pixels", "--device=cpu", "--workers=0",
                      f"--out={tmp_path}/scores.jsonl")
        assert done.exit_code == 0, done.output
        line = json.loads((tmp_path / "scores.jsonl").read_text().splitlines()[-1])
        values.append((line["value"], line["reference_num"]))
    assert values[0] == values[1] and values[0][1] == 4000


def test_images_behind_an_address_are_no_reference(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros([2, 4, 4, 3], np.uint8))
    with pytest.raises(ValueError, match=r"images \(arr_0\); download the file"):
        load_reference(str(tmp_path / "a.npz"))
