import pickle
import subprocess
import sys

import numpy as np
import pytest
from scripts import HANG_SEC, ROOT

from dnnlib import plain_pickle


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("value", [
    None, True, False, 0, 255, 65535, -1, 2**31 - 1, -2**31, 2**40, "", "text \u00e9", "x" * 300,
    [], {}, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [1, [2, {"a": (None, [True])}]],
    {"a": 1, 2: "b"}, list(range(3000)), {str(i): i for i in range(3000)}])
def test_plain_values_come_back(value, protocol):
    assert plain_pickle.loads(pickle.dumps(value, protocol)) == value


def test_bytes_come_back_or_as_text_where_python_3_wrote_them_so():
    assert plain_pickle.loads(pickle.dumps(b"\xff\0", 3)) == b"\xff\0"
    assert plain_pickle.loads(pickle.dumps(b"\xff\0", 2)) == "\xff\0"


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_bytes_come_back(protocol, order):
    values = np.asarray(np.arange(60, dtype=np.uint8).reshape(3, 4, 5), order=order)
    read = plain_pickle.loads(pickle.dumps({"x": values}, protocol))["x"]
    assert np.array_equal(read.numpy(), values)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4", "f2", "<i8", ">i4", "u1"])
def test_arrays_of_numbers_come_back_in_their_type_and_order(protocol, dtype):
    values = (np.arange(24) * 10).reshape(2, 3, 4).astype(dtype)
    for array in (values, values.T):
        read = plain_pickle.loads(pickle.dumps({"x": array}, protocol))["x"].numpy()
        assert np.array_equal(read, array) and read.dtype == array.dtype


def test_one_object_twice_stays_one():
    shared = [1]
    first, second = plain_pickle.loads(pickle.dumps([shared, shared], 2))
    assert first is second


class Anything:
    pass


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("value,text", [
    (Evil(eval, "print(1)"), "builtins.eval|__builtin__.eval"),
    (Evil(getattr, 1, "real"), "getattr"), (Anything(), "copyreg.__newobj__|NEWOBJ|reconstructor"),
    (1.5, "BINFLOAT"), (2**3000, "LONG4"), ({1, 2}, "set|SET"), (1j, "complex|BINFLOAT"),
    ({(1, 2): 3}, "keys"),
])
@pytest.mark.parametrize("protocol", [2, 4])
def test_everything_else_is_refused_by_name(value, text, protocol):
    with pytest.raises(ValueError, match=text):
        plain_pickle.loads(pickle.dumps(value, protocol))


@pytest.mark.parametrize("dtype", ["O", "S3", "?", "c8"])
def test_arrays_of_other_types_are_refused(dtype):
    read = plain_pickle.loads(b"".join([
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R",
        b"(K\x01K\x01\x85cnumpy\ndtype\nU", bytes([len(dtype)]), dtype.encode(),
        b"K\0K\x01\x87R\x89U\x01xtb."]))
    with pytest.raises(ValueError, match="isn't of numbers"):
        read.numpy()


def test_an_array_that_claims_more_than_its_bytes_is_refused():
    whole = pickle.dumps(np.zeros([3, 4], np.uint8), 2)
    assert whole.count(b"K\x03K\x04\x86") == 1
    read = plain_pickle.loads(whole.replace(b"K\x03K\x04\x86", b"K\xffK\xff\x86"))
    with pytest.raises(ValueError, match="doesn't fit"):
        read.numpy()


@pytest.mark.filterwarnings("ignore:.*invalid escape")  # of an instruction that is refused
def test_a_damaged_pickle_is_a_value_error():
    data = pickle.dumps({"labels": [1, 2, 300], "data": np.arange(9, dtype=np.uint8)}, 2)
    rng = np.random.default_rng(0)
    for length in range(len(data)):
        with pytest.raises(ValueError):
            plain_pickle.loads(data[:length])
    for _ in range(3000):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] = rng.integers(256)
        try:
            read = plain_pickle.loads(bytes(damaged))
            if isinstance(read, dict) and isinstance(read.get("data"), plain_pickle.Array):
                read["data"].numpy()
        except ValueError as error:
            assert "\n" not in str(error)[:1]


@pytest.mark.scripts
@pytest.mark.parametrize("body", [
    "b']' + b'2' * 10**7 + b'.'", "b'}' * 10**7 + b'.'", "b'(' * 10**7 + b'.'",
    "b')' + b'\\x85' * 900_000 + b'.'", "b']r\\xff\\xff\\xff\\xff.'",
    "b'}' + b')' + b'\\x85' * 900_000 + b'Ns.'", "b'T\\xff\\xff\\xff\\x7fx.'",
    "b'\\x8a\\xff' + b'\\xff' * 255 + b'.'"])
def test_hostile_pickles_end_soon_and_in_little_memory(body):
    code = ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
            "resource.setrlimit(resource.RLIMIT_CPU, (20, 20))\n"  # seconds of its own
            "from dnnlib import plain_pickle\n"
            f"try: plain_pickle.loads(b'\\x80\\x02' + {body})\n"
            "except ValueError: pass")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          timeout=HANG_SEC)
    assert done.returncode == 0, done.stderr
