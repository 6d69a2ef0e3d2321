"""Uncompressed ZIPs: written quickly in little memory, and read without trust.

`StoredZip` writes what `zipfile` would, byte for byte, but an entry of the directory takes under
100 bytes of memory instead of about 600 and is packed once. `stored_members` reads untrusted files:
members are views of the file's bytes, each byte belongs to at most one member, and nothing precedes
or follows the ZIP.

`Place` says where one member is in a file, so that any process can read it. `places` finds them in
a ZIP; `written_places` finds them in a ZIP that has no directory yet, as a killed writer leaves it:
whole members in a row, and perhaps a part of one.

Format: PKWARE's APPNOTE.TXT, sections 4.3 and 4.5.
"""

import os
import struct
import zipfile
import zlib
from typing import IO, NamedTuple

from dnnlib.util import require, shown

ZIP_MAGIC = b"PK\3\4"  # begins a member, and so the file

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_VERSION, _VERSION64 = 20, 45  # of the format that a reader must know
_UNIX = 3 << 8
_DATE = 1 << 5 | 1  # 1 January 1980, the earliest a ZIP can hold: equal images, equal files
_PERMISSIONS = 0o644 << 16
_UTF8 = 1 << 11  # a flag of a member: its name is UTF-8
_MAX_COUNT, _MAX_OFFSET = 0xFFFF, 0x7FFFFFFF  # above these, ZIP64 fields are used
_FULL = 0xFFFFFFFF  # in place of a number that is in a ZIP64 field
_MAX_MEMBERS = 100_000  # of a ZIP that is read


class StoredZip:
    """An uncompressed ZIP that is written to a binary file from its current position on."""

    def __init__(self, file: IO[bytes]):
        self._file, self._position = file, file.tell()
        self._directory, self._count = bytearray(), 0

    def write(self, name: str, data: bytes) -> None:
        """Adds a member; `name` must be new."""
        encoded, flags = name.encode(), 0 if name.isascii() else _UTF8
        assert len(data) <= _MAX_OFFSET
        fields = (flags, 0, 0, _DATE, zlib.crc32(data), len(data), len(data), len(encoded))
        header = _LOCAL.pack(ZIP_MAGIC, _VERSION, *fields, 0)
        far = self._position > _MAX_OFFSET
        extra = struct.pack("<2HQ", 1, 8, self._position) if far else b""
        version = _VERSION64 if far else _VERSION
        self._directory += _CENTRAL.pack(
            b"PK\1\2", _UNIX | version, version, *fields, len(extra), 0, 0, 0, _PERMISSIONS,
            _FULL if far else self._position) + encoded + extra
        self._file.write(header + encoded)
        self._file.write(data)
        self._position += len(header) + len(encoded) + len(data)
        self._count += 1

    def close(self) -> None:
        """Writes the directory, without which the file is not a ZIP."""
        start, size, count = self._position, len(self._directory), self._count
        self._file.write(self._directory)
        if count > _MAX_COUNT or max(start, size) > _MAX_OFFSET:
            self._file.write(_END64.pack(b"PK\6\6", _END64.size - 12, _VERSION64, _VERSION64, 0, 0,
                                         count, count, size, start))
            self._file.write(_LOCATOR64.pack(b"PK\6\7", 0, start + size, 1))
        self._file.write(_END.pack(b"PK\5\6", 0, 0, min(count, _MAX_COUNT), min(count, _MAX_COUNT),
                                   min(size, _FULL), min(start, _FULL), 0))


class Member(NamedTuple):
    """A member of a ZIP that is read; its checksum has not been compared yet."""

    name: str
    data: memoryview
    crc: int

    def read(self) -> memoryview:
        """Returns the content; raises ValueError if it does not match the checksum."""
        require(zlib.crc32(self.data) == self.crc,
                f"damaged (the checksum of {shown(self.name)} does not match)")
        return self.data


def stored_members(data: memoryview) -> dict[str, Member]:
    """Returns {name: member} of a ZIP whose members are all uncompressed, with nothing around it.

    Raises:
        ValueError: it is damaged, or a member is compressed, encrypted or duplicated.
    """
    start, end, count = _directory(data)
    require(0 < count <= _MAX_MEMBERS, f"is a ZIP of {count} members")
    members, extents, pos = {}, [], start
    for _ in range(count):
        require(pos + _CENTRAL.size <= end, "damaged (ZIP directory)")
        (magic, _, _, flags, method, _, _, crc, packed, size, name_len, extra_len, comment_len,
         _, _, _, offset) = _CENTRAL.unpack_from(data, pos)
        pos += _CENTRAL.size
        stop = pos + name_len + extra_len + comment_len
        require(magic == b"PK\1\2" and stop <= end, "damaged (ZIP directory)")
        raw = bytes(data[pos:pos + name_len])
        name = raw.decode("ascii", "backslashreplace")
        extra = data[pos + name_len:pos + name_len + extra_len]
        size, packed, offset = _wide_numbers(extra, [size, packed, offset])
        pos = stop
        require(method == 0 and packed == size and not flags & 1,
                f"compresses or encrypts the ZIP member {shown(name)}")
        require(name not in members, f"holds the ZIP member {shown(name)} twice")
        begin = _local_data(data, offset, raw)
        require(begin + size <= start, f"damaged (ZIP member {shown(name)} is cut short)")
        members[name] = Member(name, data[begin:begin + size], crc)
        extents.append((offset, begin + size))
    require(pos == end, "damaged (ZIP directory)")
    extents.sort()
    require(extents[0][0] == 0, "damaged (bytes before the first ZIP member)")
    require(all(one[1] <= two[0] for one, two in zip(extents, extents[1:], strict=False)),
            "holds ZIP members that overlap")
    return members


def _directory(data: memoryview) -> tuple[int, int, int]:
    """Returns where a ZIP's directory starts and ends and how many entries it has."""
    at = len(data) - _END.size
    require(at >= 0, "damaged (cut short)")
    magic, disk, first_disk, here, count, size, start, comment = _END.unpack_from(data, at)
    require(magic == b"PK\5\6" and comment == 0,
            "damaged (the ZIP does not end with its directory: cut short, or bytes follow)")
    locator = at - _LOCATOR64.size
    if locator >= 0 and data[locator:locator + 4] == b"PK\6\7":
        _, _, at, _ = _LOCATOR64.unpack_from(data, locator)
        require(at + _END64.size == locator, "damaged (ZIP64 directory)")
        magic, _, _, _, disk, first_disk, here, count, size, start = _END64.unpack_from(data, at)
        require(magic == b"PK\6\6", "damaged (ZIP64 directory)")
    require(disk == first_disk == 0 and here == count and start + size == at,
            "damaged (ZIP directory)")
    return start, start + size, count


def _wide_numbers(extra: memoryview, numbers: list[int]) -> list[int]:
    """Returns size, packed size and offset, taking those too large for 32 bits from `extra`."""
    wide: list[int] = []
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = [int.from_bytes(extra[4 + i:12 + i], "little") for i in range(0, length, 8)]
        extra = extra[4 + length:]
    require(len(wide) >= numbers.count(_FULL), "damaged (ZIP directory)")
    return [wide.pop(0) if number == _FULL else number for number in numbers]


def _local_data(data: memoryview, offset: int, name: bytes) -> int:
    """Returns where the content of a ZIP member begins."""
    require(offset + _LOCAL.size <= len(data), "damaged (ZIP member outside the file)")
    magic, _, flags, method, *_, name_len, extra_len = _LOCAL.unpack_from(data, offset)
    at = offset + _LOCAL.size
    require(magic == ZIP_MAGIC and method == 0 and not flags & 1
            and data[at:at + name_len] == name, "damaged (ZIP member without its header)")
    return at + name_len + extra_len


class Place(NamedTuple):
    """Where an uncompressed member is in the file of a ZIP."""

    path: str
    offset: int  # of its header
    size: int  # of its content
    crc: int

    def read(self) -> bytes:
        """Returns the content.

        Raises:
            OSError: the file can't be read.
            ValueError: the content does not match the checksum.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            header = file.read(_LOCAL.size)
            require(len(header) == _LOCAL.size and header.startswith(ZIP_MAGIC),
                    "damaged (ZIP member without its header)")
            file.seek(sum(_LOCAL.unpack(header)[-2:]), os.SEEK_CUR)  # its name and extra field
            data = file.read(self.size)
        require(len(data) == self.size and zlib.crc32(data) == self.crc,
                "damaged (the checksum does not match)")
        return data


def places(path: str | os.PathLike) -> dict[str, Place]:
    """Returns where each member of a ZIP is, by name; content is not read.

    Raises:
        OSError: it can't be read.
        ValueError: it is not a ZIP, or a member is compressed, encrypted or duplicated.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"not a ZIP, or damaged ({error})") from error
    found: dict[str, Place] = {}
    for info in infos:
        name = info.filename
        require(info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1,
                f"compresses or encrypts the ZIP member {shown(name)}")
        require(name not in found, f"holds the ZIP member {shown(name)} twice")
        found[name] = Place(os.fspath(path), info.header_offset, info.file_size, info.CRC)
    return found


def written_places(path: str | os.PathLike) -> dict[str, Place]:
    """Returns where the members are that `StoredZip` has written completely, without a directory.

    The search ends at the first incomplete member. Content is not read.

    Raises:
        OSError: it can't be read.
    """
    found: dict[str, Place] = {}
    with open(path, "rb") as file:
        total, start = os.fstat(file.fileno()).st_size, 0
        while len(header := file.read(_LOCAL.size)) == _LOCAL.size:
            magic, _, flags, method, _, _, crc, packed, size, name_len, extra_len = \
                _LOCAL.unpack(header)
            end = start + _LOCAL.size + name_len + extra_len + size
            if magic != ZIP_MAGIC or method or flags & ~_UTF8 or packed != size or end > total:
                break
            try:
                name = file.read(name_len).decode()
            except UnicodeDecodeError:
                break
            found[name] = Place(os.fspath(path), start, size, crc)
            start = file.seek(end)
    return found
