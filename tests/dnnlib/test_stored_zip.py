import io
import zipfile

import numpy as np
import pytest

from dnnlib.stored_zip import StoredZip, places, written_places


def write(file, members):
    archive = StoredZip(file)
    for name, data in members.items():
        archive.write(name, data)
    archive.close()


def by_zipfile(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            archive.writestr(info, data)
    return file.getvalue()


@pytest.mark.long
def test_the_bytes_are_those_of_zipfile():
    rng = np.random.default_rng(0)
    few = {f"{i:05d}/img.png": rng.bytes(i * 37) for i in range(20)}
    many = {f"{i}": b"" for i in range(66_000)}  # more than 65,535: ZIP64
    foreign = {"größe/猫.png": b"abc", "plain.png": b"d"}
    for members in ({}, few, many, foreign):
        file = io.BytesIO()
        write(file, members)
        assert file.getvalue() == by_zipfile(members)


def test_members_beyond_4_gigabytes_are_found(tmp_path):
    with open(tmp_path / "sparse.zip", "wb") as file:
        for start in (2**31 - 20, 2**32 + 1000):  # a hole takes no room on the disk
            file.seek(start)
            archive = StoredZip(file)
            archive.write("a/b.png", b"first")
            archive.write("c.png", b"second")
            archive.close()
    with zipfile.ZipFile(tmp_path / "sparse.zip") as archive:
        assert archive.testzip() is None
        assert [archive.read(name) for name in archive.namelist()] == [b"first", b"second"]
        assert archive.getinfo("a/b.png").header_offset == 2**32 + 1000


def whole(rng):
    return {f"{i:03d}.png": rng.bytes(int(rng.integers(0, 90))) for i in range(5)} | {
        "größe.npy": b"abc"}


def test_places_of_a_zip_give_what_zipfile_gives(tmp_path):
    members = whole(np.random.default_rng(0))
    path = tmp_path / "a.zip"
    path.write_bytes(by_zipfile(members))
    assert {name: place.read() for name, place in places(path).items()} == members
    with open(tmp_path / "far.zip", "wb") as file:  # beyond 4 GiB; a hole takes no room
        file.seek(2**32 + 1000)
        write(file, members)
    assert {name: place.read() for name, place in places(tmp_path / "far.zip").items()} == members


def test_a_zip_cut_anywhere_before_its_directory_gives_its_whole_members(tmp_path):
    members = whole(np.random.default_rng(1))
    file = io.BytesIO()
    archive, ends = StoredZip(file), []
    for name, data in members.items():
        archive.write(name, data)
        ends.append(file.tell())
    archive.close()
    path = tmp_path / "cut.part"
    for size in range(len(file.getvalue()) + 1):
        path.write_bytes(file.getvalue()[:size])
        found = written_places(path)
        assert list(found) == list(members)[:sum(end <= size for end in ends)]
        assert all(place.read() == members[name] for name, place in found.items())


def test_a_member_that_was_changed_is_not_read_and_the_next_ones_are(tmp_path):
    members = {"a": b"first" * 9, "b": b"second" * 9, "c": b"third"}
    file = io.BytesIO()
    write(file, members)
    for listing in (places, written_places):
        data = bytearray(file.getvalue())
        data[data.index(b"second") + 7] ^= 4
        (tmp_path / "x").write_bytes(data)
        found = listing(tmp_path / "x")
        assert [found[name].read() for name in "ac"] == [members["a"], members["c"]]
        with pytest.raises(ValueError, match="checksum does not match"):
            found["b"].read()
    (tmp_path / "x").write_bytes(data[:20])  # since it was listed
    with pytest.raises(ValueError, match="without its header"):
        found["c"].read()


@pytest.mark.parametrize("kwargs, words", [
    ({"compress_type": zipfile.ZIP_DEFLATED}, "compresses or encrypts the ZIP member 'x'"),
    ({}, "holds the ZIP member 'x' twice")])
def test_a_zip_whose_members_have_no_place_is_refused(kwargs, words, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x", b"1" * 99, **kwargs)
        if not kwargs:
            with pytest.warns(UserWarning, match="Duplicate"):
                archive.writestr("x", b"2")
    with pytest.raises(ValueError, match=words):
        places(tmp_path / "a.zip")
