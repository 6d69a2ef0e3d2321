"""Files in our own format that ask for much time, memory or depth: refused at once, in one line."""

import io
import time
import zipfile

import pytest
import torch

from checkpoints import checkpoint

PRIME = (1 << 61) - 1  # hashes of whole numbers are their remainders
SEC = 2  # thousands of colliding keys take far longer


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def long(value):
    data = value.to_bytes((value.bit_length() + 8) // 8, "little")
    return b"\x8a" + bytes([len(data)]) + data


def lists(depth):
    return b"]" * depth + b"a" * (depth - 1)


def tuples(depth):
    return b")" + b"\x85" * depth


def write(path, network):
    """Writes a snapshot whose network is what these instructions of a pickle make."""
    buffer = io.BytesIO()
    torch.save({"format": checkpoint.SNAPSHOT_FORMAT}, buffer)
    pickle = (b"\x80\x02}(" + text("format") + text(checkpoint.SNAPSHOT_FORMAT)
              + text("version") + b"K\x01" + text("network") + network + b"u.")
    with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(path, "w") as copy:
        for name in archive.namelist():
            copy.writestr(name, pickle if name.endswith("data.pkl") else archive.read(name))
    return path


@pytest.mark.parametrize("network", [
    b"}(" + b"".join(long(i * PRIME) + b"K\x00" for i in range(1, 30_000)) + b"u",
    b"}(" + tuples(100_000) + b"K\x00u", lists(1_000), lists(200_000), tuples(200_000),
    b"}" + text("a") + tuples(50) + b"s", b"(" * 5_000,
    b"ccollections\nOrderedDict\n](" + b"".join(
        long(i * PRIME) + b"K\x00\x86" for i in range(1, 10_000)) + b"e\x85R",
    b"cbuiltins\nset\n](" + b"".join(long(i * PRIME) for i in range(1, 30_000)) + b"e\x85R"], ids=[
    "colliding keys", "a deep key", "lists", "many lists", "tuples", "a few tuples", "marks",
    "an ordered dict", "a set"])
def test_hostile_files_are_refused_at_once(network, tmp_path):
    path, start = write(tmp_path / "x.pt", network), time.process_time()
    with pytest.raises(ValueError, match=r"x\.pt: damaged, or not a training state"):
        checkpoint.load(path)
    assert time.process_time() - start < SEC


def test_names_that_are_not_utf8_are_read_back(tmp_path):
    content = {"format": checkpoint.SNAPSHOT_FORMAT, "network": {"\udce9t": ["caf\udce9.zip"]}}
    checkpoint.save(tmp_path / "x.pt", content)
    assert checkpoint.load(tmp_path / "x.pt")["network"] == content["network"]


def test_what_is_written_is_no_such_file(tmp_path):
    nested = {"a": [{"b": (1, [2.5, {"c": torch.ones(2)}])}], 7: {0: None, 1: True, 2: 2**40}}
    content = {"format": checkpoint.SNAPSHOT_FORMAT, "network": nested, "ema": {}}
    checkpoint.save(tmp_path / "x.pt", content)
    assert checkpoint.load(tmp_path / "x.pt")["network"][7] == nested[7]
