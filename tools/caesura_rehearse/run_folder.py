"""The folder of a rehearsal's files; what rehearsals that were killed have left is removed by the next one."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from caesura.runtime.errors import ConfigError
from caesura.runtime.processes import remove_cgroups
from caesura_vmcontrol.procfs import alive, read_process

_PREFIX = "caesura-rehearse-"
_OWNER = "owner"
_BASE_MOST = 60  # characters: the path of a unix socket may have 107 bytes
_OLD_S = 60.0  # s: a guard whose owner was killed has ended by then


def cgroup_of(pid: int) -> str:
    """The name of the cgroup for the programs of the rehearsal in this process."""
    return f"{_PREFIX}{pid}"


def run_folder() -> Path:
    """A new private folder with a short path. Blocking.

    Raises:
        ConfigError: it cannot be made.
    """
    base = tempfile.gettempdir()
    if len(base) > _BASE_MOST:
        base = "/tmp"  # noqa: S108 - mkdtemp makes it private
    try:
        _sweep(Path(base))
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        own = read_process(os.getpid())
        ticks = own.start_ticks if own is not None else 0
        (folder / _OWNER).write_text(f"{os.getpid()} {ticks}", encoding="ascii")
    except OSError as error:
        raise ConfigError(f"cannot make a folder in {base}: {error.strerror or error}") from error
    return folder


def _sweep(base: Path) -> None:
    """Remove the folders and the empty cgroups of rehearsals that were killed a minute ago or earlier."""
    for folder in base.glob(f"{_PREFIX}*"):
        with suppress(OSError, ValueError):
            found = folder.lstat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime < _OLD_S:
                continue
            pid, ticks = map(int, (folder / _OWNER).read_text(encoding="ascii").split())
            if not alive(pid, ticks):
                shutil.rmtree(folder, ignore_errors=True)
                remove_cgroups({cgroup_of(pid)})
