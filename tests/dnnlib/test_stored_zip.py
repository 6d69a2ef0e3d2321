import io
import zipfile

import numpy as np
import pytest

from dnnlib.stored_zip import StoredZip


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
