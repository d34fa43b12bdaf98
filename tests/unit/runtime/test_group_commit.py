"""Group commit: what is on disk when, one sync for several commits, a WAL that stays short, and a loop that waits for no disk."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from caesura.runtime.database import Database, Wal
from caesura.runtime.errors import StoreError, SyncFailed
from caesura.runtime.group_commit import GroupCommit
from caesura_testing.collector import PATIENCE_S, eventually
from caesura_testing.disks import Disk
from caesura_testing.patience import patient

_TABLE = ("CREATE TABLE t (x INTEGER NOT NULL, filler BLOB NOT NULL)",)


def put(database: Database, number: int, size_bytes: int = 10) -> None:
    with database.transaction():
        database.run("INSERT INTO t VALUES (?, ?)", number, b"x" * size_bytes)


def wal_bytes(database: Database) -> int:
    return Path(f"{database.path}-wal").stat().st_size


def numbers_in(path: Path) -> list[int]:
    with closing(sqlite3.connect(path)) as found:
        return [x for (x,) in found.execute("SELECT x FROM t ORDER BY rowid")]


def cut_off(path: Path, lost: int, end: int) -> Path:
    """What a power cut leaves: the WAL to ``end``, without the page at ``lost`` (0: none is missing). In bytes."""
    log = bytearray(Path(f"{path}-wal").read_bytes()[:end])
    if lost:
        log[lost : lost + 4096] = bytes(len(log[lost : lost + 4096]))
    cut = path.with_name("cut.sqlite")
    shutil.copy(path, cut)
    Path(f"{cut}-wal").write_bytes(log)
    return cut


@asynccontextmanager
async def kept(commits: GroupCommit) -> AsyncIterator[None]:
    task = asyncio.create_task(commits.run())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    made = Database(str(tmp_path / "a.sqlite"), _TABLE)
    yield made
    made.close()


async def test_several_commits_share_one_sync(database: Database) -> None:
    disk = Disk(hold=True)
    commits = GroupCommit(database, sync=disk)
    async with kept(commits):
        put(database, 0)
        first = asyncio.create_task(commits.reached())
        await eventually(lambda: disk.calls == 1)
        others = []
        for number in range(1, 20):
            put(database, number)
            others.append(asyncio.create_task(commits.reached()))
            await asyncio.sleep(0)
        assert not first.done()
        assert not commits.settled
        assert commits.on_disk == 0
        disk.release()
        async with asyncio.timeout(PATIENCE_S):
            assert await first >= 1
            await asyncio.gather(*others)
        assert commits.on_disk == 20
        assert (disk.calls, commits.syncs) == (2, 2), "one for the first, one for all that came meanwhile"
        await commits.reached()
        assert disk.calls == 2, "nothing new, nothing to sync"


async def test_a_sync_covers_what_was_committed_before_it_began_and_no_more(database: Database) -> None:
    disk = Disk(hold=True)
    commits = GroupCommit(database, sync=disk)
    async with kept(commits):
        put(database, 0)
        round_ = commits.start()
        await eventually(lambda: disk.calls == 1)
        put(database, 1)
        disk.release()
        async with asyncio.timeout(PATIENCE_S):
            await round_
        assert (commits.on_disk, commits.committed) == (1, 2)


async def test_a_sync_that_failed_is_never_tried_again(database: Database) -> None:
    disk = Disk()
    commits = GroupCommit(database, sync=disk)
    keeper = asyncio.create_task(commits.run())
    disk.broken = True
    put(database, 1)
    async with asyncio.timeout(PATIENCE_S):  # one that tries again waits for nothing
        with pytest.raises(
            SyncFailed, match=r"cannot sync the store .*a\.sqlite: .*Input/output error.*dmesg"
        ):
            await commits.reached()
        disk.broken = False  # as Linux has it: the next fsync has nothing to complain of
        with pytest.raises(SyncFailed):
            await commits.reached()
    assert disk.calls == 1
    assert commits.on_disk == 0
    assert "Input/output error" in commits.ping()
    with pytest.raises(SyncFailed):
        await keeper


def test_a_wal_that_was_replaced_is_no_durable_one(tmp_path: Path) -> None:
    database = Database(str(tmp_path / "a.sqlite"), _TABLE)
    put(database, 1)
    wal = Wal(database.path)
    wal.sync()
    Path(f"{database.path}-wal").rename(f"{database.path}-moved")
    shutil.copy(f"{database.path}-moved", f"{database.path}-wal")
    with pytest.raises(SyncFailed, match="replaced"):
        wal.sync()
    wal.close()
    database.close()


def test_a_commit_behind_a_copy_does_not_begin_the_wal_from_its_start(tmp_path: Path) -> None:
    """It would sync the header, in the event loop."""
    database = Database(str(tmp_path / "a.sqlite"), _TABLE)
    database.defer_syncs()
    wal = Wal(database.path)
    for number in range(10):
        put(database, number)
    before = wal_bytes(database)
    wal.copy()
    put(database, 10)
    assert wal_bytes(database) > before
    assert wal.restart()
    begun = wal_bytes(database)
    assert 0 < begun < before, "what begins it is synced there, not by the next commit"
    put(database, 11)
    assert wal_bytes(database) > begun
    assert numbers_in(Path(database.path)) == list(range(12))
    wal.close()
    database.close()


async def test_the_wal_stays_short_while_others_commit(database: Database) -> None:
    limit = 256 * 1024
    commits = GroupCommit(database, fold_bytes=limit)
    shortened = last = 0
    async with kept(commits):
        for number in range(400):
            await commits.writable()
            put(database, number, 3000)
            await commits.reached()
            shortened += wal_bytes(database) < last
            last = wal_bytes(database)
        assert database.run("SELECT count(*) FROM t") == [(400,)]
        await eventually(lambda: wal_bytes(database) < limit)
    assert shortened, "some 3 MB were written"
    assert database.run("PRAGMA synchronous") == [(1,)]


async def test_a_reader_keeps_the_wal_long_and_nobody_waits_for_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("caesura.runtime.database._READERS_S", 0.01)
    commits = GroupCommit(database, fold_bytes=64 * 1024)
    async with kept(commits):
        with closing(sqlite3.connect(database.path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM t").fetchall()
            for number in range(200):
                await commits.writable()
                put(database, number, 3000)
                await commits.reached()
            assert wal_bytes(database) > 400_000
        for number in range(200):
            await commits.writable()
            put(database, number, 3000)
            await commits.reached()
        await eventually(lambda: wal_bytes(database) < 200_000)


@pytest.mark.parametrize("answers", [True, False])
def test_the_end_of_a_process_does_not_wait_for_a_disk_that_hangs(tmp_path: Path, answers: bool) -> None:
    """Closing the last connection folds the WAL into the file, with an fsync; so does the end of the interpreter."""
    text = """
import asyncio, sys
from caesura.runtime.database import Database
from caesura.runtime.group_commit import GroupCommit
from caesura_testing.disks import Disk

async def main():
    commits = GroupCommit(database, sync=Disk(hold=not answers))
    with database.transaction():
        database.run("INSERT INTO t VALUES (1, 'x')")
    if answers:
        await commits.reached()
    commits.close()

answers = sys.argv[3] == "True"
database = Database(sys.argv[1], [sys.argv[2]])
asyncio.run(main())
"""
    path = tmp_path / "a.sqlite"
    subprocess.run(
        [sys.executable, "-c", text, str(path), *_TABLE, str(answers)], check=True, timeout=patient(60)
    )
    assert Path(f"{path}-wal").exists() is not answers
    assert numbers_in(path) == [1]


async def test_what_was_folded_while_others_synced_is_not_folded_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time commits are held back, and where somebody reads in the WAL for as long as that is waited for."""
    folds, may_copy = [], threading.Event()
    copy, restart = Wal.copy, Wal.restart

    def slow_copy(wal: Wal) -> None:
        may_copy.wait()
        copy(wal)

    def counted_restart(wal: Wal) -> bool:
        folds.append(wal.path)
        return restart(wal)

    commits = GroupCommit(database, fold_bytes=64 * 1024)
    monkeypatch.setattr(Wal, "copy", slow_copy)
    monkeypatch.setattr(Wal, "restart", counted_restart)
    async with kept(commits):
        for number in range(30):
            put(database, number, 3000)
            await commits.reached()
        may_copy.set()
        await eventually(lambda: wal_bytes(database) < 64 * 1024)
        await commits.writable()
        put(database, 30)
        await commits.reached()
        for _ in range(20):  # what would be folded again would be begun by now
            await asyncio.sleep(0)
        await commits.writable()
    assert len(folds) == 1


def test_a_disk_that_fails_to_sync_at_the_start_is_not_built_upon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(wal: Wal) -> bool:
        raise SyncFailed(wal.path, "disk I/O error")

    database = Database(str(tmp_path / "a.sqlite"), _TABLE)
    monkeypatch.setattr(Wal, "restart", broken)
    with pytest.raises(SyncFailed, match="disk I/O error"):
        GroupCommit(database)
    database.close()


async def test_a_file_without_room_is_opened_and_refuses_what_it_cannot_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Wal) -> bool:
        raise StoreError("database or disk is full")

    database = Database(str(tmp_path / "a.sqlite"), _TABLE)
    monkeypatch.setattr(Wal, "restart", full)
    commits = GroupCommit(database)
    ((pages,),) = database.run("PRAGMA page_count")
    database.run(f"PRAGMA max_page_count = {pages}")
    async with kept(commits):
        with pytest.raises(StoreError, match="full"):
            put(database, 1, 1_000_000)
        assert commits.settled, "it was rolled back at once"
        put(database, 2)
        await commits.reached()
    assert database.run("SELECT x FROM t") == [(2,)]
    database.close()


async def test_a_file_without_room_keeps_its_wal_and_continues(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Wal) -> None:
        raise StoreError("database or disk is full")

    monkeypatch.setattr(Wal, "copy", full)
    commits = GroupCommit(database, fold_bytes=64 * 1024)
    with capture_logs() as logs:
        async with kept(commits):
            for number in range(50):
                put(database, number, 3000)
                await commits.reached()
            await eventually(lambda: any(each["event"] == "store.not_folded" for each in logs))
            monkeypatch.undo()
            for number in range(50):
                await commits.writable()
                put(database, number, 3000)
                await commits.reached()
            await eventually(lambda: wal_bytes(database) < 100_000)


async def test_a_disk_that_does_not_answer_is_named(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("caesura.runtime.group_commit._SLOW_S", 0.05)
    disk = Disk(hold=True)
    commits = GroupCommit(database, sync=disk)
    async with kept(commits):
        assert commits.ping() == ""
        put(database, 1)
        waiting = asyncio.create_task(commits.reached())
        await eventually(lambda: "has not finished a sync" in commits.ping())
        disk.release()
        async with asyncio.timeout(PATIENCE_S):
            await waiting
        assert commits.ping() == ""


async def test_what_an_earlier_process_left_unsynced_is_written_again_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an fsync that failed the kernel takes pages for written: the next one must have something to write."""
    path = str(tmp_path / "a.sqlite")
    before = Database(path, _TABLE)
    GroupCommit(before)
    put(before, 1)
    written: list[tuple[int, int]] = []
    pwrite = os.pwrite

    def noted(file: int, data: bytes, at: int) -> int:
        written.append((at, len(data)))
        return pwrite(file, data, at)

    size = wal_bytes(before)
    monkeypatch.setattr(os, "pwrite", noted)
    GroupCommit(before)
    monkeypatch.undo()
    assert written[0] == (0, size)
    assert numbers_in(tmp_path / "a.sqlite") == [1]
    before.close()


def test_a_process_that_was_killed_between_commit_and_sync_loses_nothing(tmp_path: Path) -> None:
    script = """
import asyncio, os, signal, sys
from caesura.runtime.database import Database
from caesura.runtime.group_commit import GroupCommit
from caesura_testing.disks import Disk

async def main():
    database = Database(sys.argv[1], ["CREATE TABLE t (x INTEGER NOT NULL)"])
    disk = Disk()
    commits = GroupCommit(database, sync=disk)
    disk.hold()
    for number in range(5):
        with database.transaction():
            database.run("INSERT INTO t VALUES (?)", number)
    commits.start()
    while not disk.calls:
        await asyncio.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    path = tmp_path / "a.sqlite"
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False, timeout=100)
    assert done.returncode == -signal.SIGKILL
    assert numbers_in(path) == list(range(5))


_NO_FSYNC = """
import asyncio, ctypes, errno, os, platform, struct, sys
from caesura.runtime.database import Database
from caesura.runtime.errors import StoreError
from caesura.runtime.group_commit import GroupCommit

NUMBERS = {"x86_64": (74, 75), "aarch64": (82, 83)}[platform.machine()]

def forbid_fsync_in_this_thread():
    # seccomp(2): load the number of the call; fsync and fdatasync fail with EIO, all else is allowed.
    step = lambda code, jt, jf, k: struct.pack("HBBI", code, jt, jf, k)
    program = b"".join([
        step(0x20, 0, 0, 0),
        step(0x15, 1, 0, NUMBERS[0]),
        step(0x15, 0, 1, NUMBERS[1]),
        step(0x06, 0, 0, 0x00050000 | errno.EIO),
        step(0x06, 0, 0, 0x7FFF0000),
    ])
    buffer = ctypes.create_string_buffer(program)
    filter_ = struct.pack("HxxxxxxP", 5, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, filter_, 0, 0):
        print("no seccomp:", os.strerror(ctypes.get_errno()))
        raise SystemExit(77)

async def main():
    database = Database(sys.argv[1], ["CREATE TABLE t (x INTEGER NOT NULL, filler BLOB NOT NULL)"])
    commits = GroupCommit(database, fold_bytes=64 * 1024)
    keeper = asyncio.create_task(commits.run())
    progress = 0

    async def some(first, count):
        folded, last = 0, 0
        for number in range(first, first + count):
            await commits.writable()
            with database.transaction():
                database.run("INSERT INTO t VALUES (?, ?)", number, b"x" * 3000)
            await commits.reached()
            size = os.stat(sys.argv[1] + "-wal").st_size
            folded += size < last
            last = size
        return folded

    while not await some(0, 30):  # until both threads are there: a thread inherits the filter of the one that makes it
        pass
    other = Database(sys.argv[1] + "-full", ["CREATE TABLE t (x INTEGER NOT NULL)"])
    forbid_fsync_in_this_thread()
    assert await some(1000, 300) > 1, "the WAL never began from its start"
    try:
        with other.transaction():
            other.run("INSERT INTO t VALUES (1)")
    except StoreError:
        print("ok")
    else:
        print("the filter does nothing")
    assert not keeper.done()
    sys.stdout.flush()
    os._exit(0)

asyncio.run(main())
"""


def test_no_fsync_is_done_in_the_thread_of_the_event_loop(tmp_path: Path) -> None:
    """Every fsync of that thread fails, and nothing of it is noticed, while the WAL is folded several times."""
    done = subprocess.run(
        [sys.executable, "-c", _NO_FSYNC, str(tmp_path / "a.sqlite")],
        check=False,
        timeout=100,
        capture_output=True,
        text=True,
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert (done.stdout.strip(), done.returncode) == ("ok", 0), done.stderr


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["commit", "sync", "large"]), min_size=1, max_size=40), st.data())
async def test_after_a_power_cut_there_is_a_prefix_with_everything_that_was_reached(
    steps: list[str], data: st.DataObject
) -> None:
    """The cut leaves of the WAL what was synced, and of the rest any pages: one of those is missing, the others may be there."""
    with tempfile.TemporaryDirectory() as folder:
        database = Database(str(Path(folder, "a.sqlite")), _TABLE)
        disk = Disk()
        commits = GroupCommit(database, sync=disk)
        synced = wal_bytes(database)
        keeper = asyncio.create_task(commits.run())
        number = reached = 0
        for step in steps:
            if step == "sync":
                await commits.reached()
                synced, reached = wal_bytes(database), number
            else:
                number += 1
                put(database, number, 9000 if step == "large" else 10)
        lost, end = 0, wal_bytes(database)
        if end > synced:
            lost = data.draw(st.integers(synced, end - 1))
            end = data.draw(st.integers(lost + 1, end))
        found = numbers_in(cut_off(Path(database.path), lost, end))
        assert found == list(range(1, len(found) + 1))
        assert len(found) >= reached
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        database.close()
