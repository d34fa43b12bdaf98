"""Fills a share of RAM with a seeded pattern and compares all of it with the pattern when asked.

``caesura.memory`` (50): per cent of MemTotal, cut to what is free. ``caesura.seed`` (1).
``caesura.dirty_mib`` (0): size of a second region that is rewritten over and over, ``caesura.dirty_mib_s`` (50)
per second. On port ``org.caesura.memory.0`` the request ``verify`` compares every byte, ``status`` does not;
``swap-byte`` damages one byte, so that a test can see that it is found.

The pattern is a random block, repeated. Its length is 8 bytes times an odd number, so that it begins at a different
offset in every page and no two pages of the region are alike: swapped pages are found, too.
Every byte is compared, by our own loop over 64-bit words: under TCG it does 1.0 to 1.8 GB/s where memcmp(3), which
uses vector instructions that TCG emulates one by one, does 0.4 to 0.8.
"""

from __future__ import annotations

import _random
import ctypes
import mmap
import time
from collections.abc import Callable

from .parameters import Parameters
from .ports import RequestPort

PORT = "org.caesura.memory.0"
PAGE = 4096
MIB = 1 << 20
_KEEP_FREE = 24 * MIB
_STEP = 64 * 1024
_STEPS_PER_S = 100

_UNIT = 64
_WORDS = b"".join(
    b"\x4c\x8b\x47%c" % at  # mov r8, [rdi + at]
    + b"\x4c\x33\x46%c" % at  # xor r8, [rsi + at]
    + b"\x4c\x09\xc0"  # or rax, r8
    for at in range(0, _UNIT, 8)
)
_LOOP = _WORDS + b"\x48\x83\xc7\x40\x48\x83\xc6\x40\x48\xff\xca"  # add rdi, 64; add rsi, 64; dec rdx
_COMPARE = (
    b"\x31\xc0\x48\x85\xd2\x74%c" % (len(_LOOP) + 2)  # xor eax, eax; test rdx, rdx; jz to ret
    + _LOOP
    + b"\x75%c" % (256 - len(_LOOP) - 2)  # jnz back
    + b"\xc3"  # ret
)
"""x86-64, System V calling convention: the guest is x86-64."""


def period(size: int) -> int:
    """Bytes of the block: 8 times an odd number, with a distinct offset for each page of ``size``."""
    return 8 * ((size // PAGE) | 1) if size > PAGE else 8 * 513


class Region:
    """Memory filled with the pattern."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._block = _random_bytes(period(size), seed)
        self._code, self._differs = _comparer()
        self._map = mmap.mmap(-1, size)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        for offset in range(0, size, len(self._block)):
            ctypes.memmove(self._start + offset, self._block, min(len(self._block), size - offset))

    def first_difference(self) -> int | None:
        """Offset of the first byte that differs from the pattern."""
        length = len(self._block)
        for offset in range(0, self.size, length):
            count = min(length, self.size - offset)
            units = count // _UNIT
            rest = units * _UNIT
            if (
                self._differs(self._start + offset, self._block, units)
                or self._map[offset + rest : offset + count] != self._block[rest:count]
            ):
                found = self._map[offset : offset + count]
                return offset + next(place for place in range(count) if found[place] != self._block[place])
        return None

    def damage(self, offset: int) -> None:
        """Change one byte."""
        self._map[offset] ^= 1


class HotRegion:
    """Memory that is rewritten step by step, each step with a different part of the pattern, and that can be compared, too."""

    def __init__(self, size: int, seed: int) -> None:
        self.steps = size // _STEP
        self._block = _random_bytes(2 * _STEP, seed)
        self._map = mmap.mmap(-1, max(size, PAGE))
        self._cut = [0] * self.steps
        self.written = 0
        for _ in range(self.steps):
            self.write()

    def _expected(self, cut: int) -> bytes:
        start = 8 * (cut % (_STEP // 8))
        return self._block[start : start + _STEP]

    def write(self) -> None:
        """Rewrite one more step."""
        step = self.written % self.steps
        self._cut[step] = self.written
        self._map[step * _STEP : (step + 1) * _STEP] = self._expected(self.written)
        self.written += 1

    def first_difference(self) -> int | None:
        """Offset of the first step whose content differs from its last write."""
        for step, cut in enumerate(self._cut):
            if self._map[step * _STEP : (step + 1) * _STEP] != self._expected(cut):
                return step * _STEP
        return None


def _comparer() -> tuple[mmap.mmap, Callable[[int, bytes, int], int]]:
    """The function (address, bytes, units of 64 bytes) -> 0 if all are equal, and the memory that it lives in."""
    code = mmap.mmap(-1, PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code[: len(_COMPARE)] = _COMPARE
    kind = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
    return code, kind(ctypes.addressof(ctypes.c_char.from_buffer(code)))


def _random_bytes(count: int, seed: int) -> bytes:
    return _random.Random(seed).getrandbits(8 * count).to_bytes(count, "little")


def _json(value: bool | int | None) -> str:
    return "null" if value is None else str(value).lower()


def _meminfo() -> dict[str, int]:
    with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - start-up time
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}


def run(parameters: Parameters) -> None:
    """Fill, then dirty and answer requests indefinitely."""
    begun = time.monotonic()
    hot_size = int(parameters.get("dirty_mib", "0")) * MIB
    facts = _meminfo()
    wanted = facts["MemTotal"] * int(parameters.get("memory", "50")) // 100
    size = max(PAGE, min(wanted, facts["MemAvailable"] - _KEEP_FREE - hot_size) // PAGE * PAGE)
    seed = int(parameters.get("seed", "1"))
    region, hot = Region(size, seed), HotRegion(hot_size, seed + 1)
    fill_s = time.monotonic() - begun
    state = {"checks": 0}

    def status() -> bytes:
        return b'{"bytes":%d,"wanted":%d,"fill_s":%.3f,"dirty_bytes":%d,"dirty_written":%d,"checks":%d}' % (
            *(size, wanted, fill_s),
            *(hot_size, hot.written * _STEP, state["checks"]),
        )

    def verify() -> bytes:
        started = time.monotonic()
        cold_at, hot_at = region.first_difference(), hot.first_difference()
        taken_s = time.monotonic() - started
        state["checks"] += 1
        return (
            f'{{"ok":{_json(cold_at is None and hot_at is None)},"bytes":{size + hot_size},"seconds":{taken_s:.4f},'
            f'"bad_offset":{_json(cold_at)},"bad_dirty_offset":{_json(hot_at)},'
            f'"dirty_written":{hot.written * _STEP},"checks":{state["checks"]}}}'
        ).encode()

    def damage() -> bytes:
        region.damage(size // 2)
        return b'{"damaged":%d}' % (size // 2)

    requests = RequestPort(PORT, {b"verify": verify, b"status": status, b"swap-byte": damage})
    steps = float(parameters.get("dirty_mib_s", "50")) * MIB / _STEP / _STEPS_PER_S if hot.steps else 0.0
    due, owed = time.monotonic(), 0.0
    while True:
        due = max(due + 1 / _STEPS_PER_S, time.monotonic()) if steps else time.monotonic() + 3600
        owed += steps
        while owed >= 1:
            hot.write()
            owed -= 1
        requests.serve_until(due)
