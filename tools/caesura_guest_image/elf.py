"""Which shared libraries an ELF file needs: DT_NEEDED of 64-bit little-endian files (System V ABI, chapter 5)."""

from __future__ import annotations

import struct

_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NEEDED, _DT_STRTAB = 1, 5
_HEADER = struct.Struct("<16xHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_DYNAMIC = struct.Struct("<qQ")


class NotElf(ValueError):
    """Not a 64-bit little-endian ELF file."""


def needed_libraries(data: bytes) -> list[str]:
    """Names such as ``libc.so.6``; none for a static program.

    Raises:
        NotElf: it is something else, or cut off.
    """
    if data[:6] != b"\x7fELF\x02\x01":
        raise NotElf("not a 64-bit little-endian ELF file")
    try:
        return _needed(data)
    except (struct.error, IndexError, ValueError) as error:
        raise NotElf(f"a damaged ELF file: {error}") from error


def _needed(data: bytes) -> list[str]:
    header = _HEADER.unpack_from(data)
    table, entry_size, count = header[4], header[8], header[9]
    segments = [_PROGRAM_HEADER.unpack_from(data, table + entry_size * each) for each in range(count)]
    tags: list[tuple[int, int]] = []
    for kind, _flags, offset, _address, _physical, size, _memory, _align in segments:
        if kind == _PT_DYNAMIC:
            tags = list(_DYNAMIC.iter_unpack(data[offset : offset + size]))
    strings = next((value for tag, value in tags if tag == _DT_STRTAB), None)
    if strings is None:
        return []
    base = next(
        strings - address + offset
        for kind, _flags, offset, address, _physical, size, _memory, _align in segments
        if kind == _PT_LOAD and address <= strings < address + size
    )
    return [
        data[base + value : data.index(b"\0", base + value)].decode()
        for tag, value in tags
        if tag == _DT_NEEDED
    ]
