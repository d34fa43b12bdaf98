"""Whether this host's wall clock may be the reference of its guests' clocks.

It always may, but for a host whose kernel was replaced where the processor's counter did not carry the time over: a kernel sets its
clock from the RTC, up to half a second beside the truth, and guests that are set by it would be wrong and be called right.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from caesura.runtime.logs import get_logger
from caesura.runtime.threads import Worker
from caesura_vmcontrol.durable_files import write_durably
from caesura_vmcontrol.procfs import boot_id

_FILE = "host-clock.json"
_STATUS_AT = 40  # struct timex of include/uapi/linux/timex.h, on 64 bits: modes, four longs, status
_TIMEX_BYTES = 256  # a little more than the structure's 208
_UNSYNC = 0x40  # STA_UNSYNC: no NTP client has set the clock since it was last set otherwise

_CLOSE_S = 1.0  # s: for a small file at shutdown

_log = get_logger("caesura.clock")


def is_synchronized() -> bool:
    """Whether an NTP client keeps the host's clock, as the kernel says (adjtimex(2)). False where we may not ask."""
    import ctypes  # noqa: PLC0415 - few hosts need it

    timex = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes 0: nothing is set
    if ctypes.CDLL(None, use_errno=True).adjtimex(timex) < 0:
        return False
    return not int.from_bytes(timex.raw[_STATUS_AT : _STATUS_AT + 4], "little") & _UNSYNC


class ReferenceClock:
    """See the module. Only ``load`` and ``close`` wait for the disk: what is written down is, in a thread, after it holds.

    Args:
        state_dir: the state folder, which outlives this process: the clock does, too.
        synchronized: whether NTP keeps the clock; injected by tests only.
    """

    def __init__(self, state_dir: Path, synchronized: Callable[[], bool] = is_synchronized) -> None:
        self._folder = state_dir
        self._synchronized = synchronized
        self._uncertainty_s = 0.0
        self._disk = Worker("host clock")

    async def load(self) -> None:
        """What an earlier run of this service wrote down in this boot, unless more is known by now."""
        earlier = await self._disk.do(self._read)
        self._uncertainty_s = self._uncertainty_s or earlier

    async def close(self) -> None:
        """Write down what is still to be written; a disk that hangs is left to itself."""
        await self._disk.close(_CLOSE_S)

    def distrust(self, uncertainty_s: float) -> None:
        """The clock may be off by so much, until NTP has set it."""
        self._uncertainty_s = uncertainty_s
        self._disk.post(lambda: self._write(uncertainty_s))
        if why := self.error():
            _log.error("host_clock.not_trusted", why=why)

    def error(self) -> str:
        """Why no guest may be set by this clock now; empty: it may."""
        if not self._uncertainty_s:
            return ""
        if self._synchronized():
            _log.info("host_clock.trusted", uncertainty_s=self._uncertainty_s)
            self._uncertainty_s = 0.0
            self._disk.post(self._remove)
            return ""
        return (
            f"the host's own clock may be {self._uncertainty_s:g} s off since its kernel was replaced, until NTP has set it: "
            "see timedatectl"
        )

    def _write(self, uncertainty_s: float) -> None:
        data = json.dumps({"boot_id": boot_id(), "uncertainty_s": uncertainty_s})
        try:
            write_durably(str(self._folder), _FILE, data.encode())
        except OSError as error:
            _log.error("host_clock.not_written", why=str(error))

    def _remove(self) -> None:
        with suppress(OSError):
            (self._folder / _FILE).unlink()

    def _read(self) -> float:
        with suppress(OSError, ValueError, KeyError, TypeError):
            data = json.loads((self._folder / _FILE).read_bytes())
            if data["boot_id"] == boot_id():
                return float(data["uncertainty_s"])
        return 0.0
