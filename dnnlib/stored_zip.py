"""Writes uncompressed ZIPs of very many members, quickly and in little memory.

It writes what `zipfile` would write, byte for byte, but an entry of the directory takes under 100
bytes of memory instead of about 600 and is packed once. The format is that of PKWARE's
APPNOTE.TXT, sections 4.3 and 4.5.
"""

import struct
import zlib
from typing import IO

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_VERSION, _VERSION64 = 20, 45  # of the format that a reader must know
_UNIX = 3 << 8
_DATE = 1 << 5 | 1  # 1 January 1980, the earliest a ZIP can hold: equal images, equal files
_PERMISSIONS = 0o644 << 16
_MAX_COUNT, _MAX_OFFSET = 0xFFFF, 0x7FFFFFFF  # beyond, the fields of ZIP64


class StoredZip:
    """An uncompressed ZIP that is written to a binary file from its current position on."""

    def __init__(self, file: IO[bytes]):
        self._file, self._position = file, file.tell()
        self._directory, self._count = bytearray(), 0

    def write(self, name: str, data: bytes) -> None:
        """Adds a member; `name` is ASCII and new."""
        encoded = name.encode("ascii")
        assert len(data) <= _MAX_OFFSET
        fields = (0, 0, 0, _DATE, zlib.crc32(data), len(data), len(data), len(encoded))
        header = _LOCAL.pack(b"PK\3\4", _VERSION, *fields, 0)
        far = self._position > _MAX_OFFSET
        extra = struct.pack("<2HQ", 1, 8, self._position) if far else b""
        version = _VERSION64 if far else _VERSION
        self._directory += _CENTRAL.pack(
            b"PK\1\2", _UNIX | version, version, *fields, len(extra), 0, 0, 0, _PERMISSIONS,
            0xFFFFFFFF if far else self._position) + encoded + extra
        self._file.write(header + encoded)
        self._file.write(data)
        self._position += len(header) + len(encoded) + len(data)
        self._count += 1

    def close(self) -> None:
        """Writes the directory, without which the file is no ZIP."""
        start, size, count = self._position, len(self._directory), self._count
        self._file.write(self._directory)
        if count > _MAX_COUNT or max(start, size) > _MAX_OFFSET:
            self._file.write(_END64.pack(b"PK\6\6", _END64.size - 12, _VERSION64, _VERSION64, 0, 0,
                                         count, count, size, start))
            self._file.write(_LOCATOR64.pack(b"PK\6\7", 0, start + size, 1))
        self._file.write(_END.pack(b"PK\5\6", 0, 0, min(count, _MAX_COUNT), min(count, _MAX_COUNT),
                                   min(size, 0xFFFFFFFF), min(start, 0xFFFFFFFF), 0))
