"""Random damage to all that is given: an error of one line, or a sound result, and nothing else."""

import io
import json
import math
import random
import zipfile

import click
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pickle_assembler import mutated

from checkpoints import checkpoint
from dnnlib.cli import IntList, NumberList
from dnnlib.npy_header import read_npy_header
from images import array_files
from images.image_files import label_array, parse_labels
from metrics.references import load_reference

MISTAKES = (ValueError, OSError, click.ClickException)
# The same examples on every machine, however slow it is.
SAME_EVERYWHERE = settings(deadline=None, derandomize=True,
                           suppress_health_check=[HealthCheck.too_slow])
# What breaks parsers: no number, too large, too deep, half a surrogate, other digits.
JSON_PIECES = [b"null", b"true", b"1e999", b"NaN", b"-1", b"{}", b"[", b"]", b'"', b"1.5",
               b"99999999999999999999", b'"\\ud800"', b"9" * 5000, b"[" * 100_000,
               b'{"a":' * 50_000, b"\xef\xbb\xbf", b"Infinity", b"\0"]


def survives(function, *args):
    """Returns the result of a function, None where it ends in a mistake told in words."""
    try:
        return function(*args)
    except MISTAKES as error:
        assert str(error).strip()
        return None


def spliced(data, pieces, rng):
    """Returns a copy with some pieces put in, over what was there or between it."""
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(pieces) + data[at + rng.choice((0, 1, 3)):]
    return data


def test_lists_of_any_characters_are_numbers_in_range_or_a_mistake():
    rng, found = random.Random(1), 0
    for _ in range(5000):
        text = "".join(rng.choice("0123456789,,-. e+_infNa\u0663\0\n\u00b2")
                       for _ in range(rng.randrange(7)))
        for numbers in (survives(IntList().convert, text, None, None),
                        survives(NumberList(int, 0, 30).convert, text, None, None)):
            if numbers is not None:
                assert numbers and all(type(n) is int and n >= 0 for n in numbers)
                found += 1
        numbers = survives(NumberList(float, 0).convert, text, None, None)
        assert numbers is None or all(0 <= n < float("inf") for n in numbers)
    assert found > 200
    assert survives(IntList().convert, "1" * 5000, None, None) is None


RANGES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 30)), min_size=1, max_size=8)


@settings(SAME_EVERYWHERE)
@given(RANGES)
def test_lists_of_numbers_and_ranges_are_read_as_they_are_written(ranges):
    text = ",".join(f"{low}" if more == 0 else f"{low}-{low + more}" for low, more in ranges)
    expected = [n for low, more in ranges for n in range(low, low + more + 1)]
    found = survives(IntList().convert, text, None, None)
    assert list(found) == expected if len(set(expected)) == len(expected) else (
        found is None or sorted(set(found)) == sorted(set(expected)))


@settings(SAME_EVERYWHERE, max_examples=300)
@given(st.text(max_size=40))
def test_any_text_is_a_list_of_numbers_or_a_mistake(text):
    for kind in (IntList(), NumberList(int, 1, 32), NumberList(float, 0)):
        numbers = survives(kind.convert, text, None, None)
        assert numbers is None or (len(numbers) and all(math.isfinite(n) and n >= 0
                                                    for n in numbers))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner,
                                                                max_size=4), max_leaves=12)
PAIRS = st.lists(st.lists(st.sampled_from(["a.png", "b.png", "c.png"]) | JSON, max_size=3),
                 max_size=4)


@pytest.mark.long
@settings(SAME_EVERYWHERE, max_examples=300)
@given(JSON | st.fixed_dictionaries({"labels": PAIRS | JSON}))
def test_any_json_is_labels_of_all_images_or_a_mistake(value):
    data = json.dumps(value).encode()
    labels = survives(parse_labels, data, "dataset.json")
    if labels:
        array = survives(label_array, ["a.png", "b.png"], labels, "dataset.json")
        assert array is None or (len(array) == 2 and np.isfinite(array).all())


NAMES = ["a.png", "b.png", "c/\u00fc.png"]


@pytest.mark.parametrize("values", [[1, 2, 0], [[1.0, 2], [0, 1e3], [-1, 1]]],
                         ids=["classes", "vectors"])
def test_damaged_labels_are_refused_or_finite_and_of_all_images(values):
    good = json.dumps({"labels": list(zip(NAMES, values, strict=True))}).encode()
    rng, found = random.Random(2), 0

    def read(data):
        labels = parse_labels(data, "dataset.json")
        return labels and label_array(NAMES, labels, "dataset.json")

    assert len(read(good)) == 3
    for i in range(4000):
        data = mutated(good, rng) if i % 2 else spliced(good, JSON_PIECES, rng)
        labels = survives(read, data)
        if labels is not None:
            assert len(labels) == 3 and np.isfinite(labels).all()
            found += 1
    assert found > 20


def npy(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Reading")
def test_damaged_arrays_are_refused_or_finite_images_of_their_kind():
    rng, found = random.Random(3), 0
    for dtype in (np.uint8, np.float32):
        good = npy(np.ones([3, 4, 5], dtype))
        for _ in range(3000):
            result = survives(array_files.decode, mutated(good, rng))
            if result is not None:
                assert result[0].shape == result[1].shape and np.isfinite(result[0]).all()
                found += 1
    assert found > 500


@pytest.mark.parametrize("header", [
    "{'descr': '<f8', 'fortran_order': False, 'shape': (3", "{" * 300, "(" * 9000, "-" * 9000,
    "{b'descr': '<f8', 'fortran_order': False, 'shape': (3,)}", "[]", "{'descr': None}",
    "{'descr': [('a', '<f8', -1)], 'fortran_order': False, 'shape': (3,)}",
    "{'descr': ('<f8', (2**70,)), 'fortran_order': False, 'shape': (3,)}",
    "{'descr': 3, 'fortran_order': False, 'shape': (3,)}",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (1e5,)}"])
def test_headers_that_make_numpy_stumble_are_value_errors(header):
    data = b"\x93NUMPY\1\0" + (len(header) + 1).to_bytes(2, "little") + header.encode() + b"\n"
    with pytest.raises(ValueError, match="not a NumPy array"):
        read_npy_header(io.BytesIO(data))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Reading")
def test_damaged_reference_statistics_are_refused_or_a_covariance(tmp_path):
    rng, path, found = random.Random(4), tmp_path / "ref.npz", 0
    arrays = {"mu": np.zeros(4), "sigma": np.eye(4), "detector": np.array("pixels"),
              "count": np.array(3), "features": np.zeros([3, 4], np.float32)}

    def write(values):
        with io.BytesIO() as file:
            np.savez(file, **values)
            return file.getvalue()

    good = write(arrays)
    for i in range(2000):
        if i % 4:  # where the ZIP's own checksums see it
            path.write_bytes(mutated(good, rng))
        else:  # where they do not
            members = {f"{name}.npy": npy(value) for name, value in arrays.items()}
            name = rng.choice(list(members))
            members[name] = mutated(members[name], rng)
            with zipfile.ZipFile(path, "w") as archive:
                for member, data in members.items():
                    archive.writestr(member, data)
        reference = survives(load_reference, str(path))
        if reference is not None:
            assert reference.sigma.shape == 2 * reference.mu.shape
            assert np.isfinite(reference.sigma).all()
            found += 1
    assert found > 20


@pytest.mark.long
def test_damaged_states_are_refused_or_untouched(tmp_path):
    rng, path = random.Random(5), tmp_path / "training-state-000001.pt"
    content = {"format": checkpoint.STATE_FORMAT, "optimizer": {"step": torch.ones(3)},
               "net": {"w": torch.arange(6.0)}, "network": {"class_name": "EDMPrecond"},
               "progress": {"cur_nimg": 1}}
    checkpoint.save(path, content)
    good = path.read_bytes()
    expected = checkpoint.digest(checkpoint.load(path))
    for _ in range(1000):
        path.write_bytes(mutated(good, rng))
        state = survives(checkpoint.load_state, path)
        if state is not None:  # the damage was to what the ZIP says twice
            assert checkpoint.digest(state) == expected
        assert checkpoint.recorded_nimg(path) >= 0


@pytest.mark.long
def test_damaged_safetensors_are_refused_or_untouched(tmp_path):
    pytest.importorskip("safetensors")
    rng, path = random.Random(6), tmp_path / "network.safetensors"
    checkpoint.save_safetensors(path, {
        "format": checkpoint.SNAPSHOT_FORMAT, "ema": {"w": torch.ones(2, 3)},
        "network": {"class_name": "EDMPrecond"}, "progress": {"cur_nimg": 1}})
    good = path.read_bytes()
    expected = checkpoint.digest(checkpoint.load(path))
    for i in range(2000):
        path.write_bytes(mutated(good, rng) if i % 2 else spliced(good, JSON_PIECES, rng))
        snapshot = survives(checkpoint.load, path)
        assert snapshot is None or checkpoint.digest(snapshot) == expected
