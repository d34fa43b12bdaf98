"""The SQLite opener and the state folder's lock: failures are clear and leave nothing behind."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from caesura.runtime.database import Database
from caesura.runtime.errors import StoreError
from caesura.runtime.lock import InUse, StateFolderUnusable, exclusive_lock, private_dir

_ONE = ("CREATE TABLE t (x INTEGER NOT NULL)",)


def test_a_transaction_is_all_or_nothing(tmp_path: Path) -> None:
    database = Database(str(tmp_path / "s" / "a.sqlite"), _ONE)

    def half_done() -> None:
        with database.transaction():
            database.run("INSERT INTO t VALUES (1)")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - our own, two lines above
        half_done()
    assert database.run("SELECT * FROM t") == []
    with database.transaction():
        database.run("INSERT INTO t VALUES (2)")
    database.close()
    again = Database(str(tmp_path / "s" / "a.sqlite"), _ONE)
    assert again.run("SELECT x FROM t") == [(2,)]
    assert again.ping() == ""
    again.close()


def test_migrations_run_once_and_a_newer_file_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sqlite")
    Database(path, _ONE).close()
    two = (*_ONE, "ALTER TABLE t ADD COLUMN y TEXT")
    Database(path, two).close()
    again = Database(path, two)
    again.run("INSERT INTO t VALUES (1, 'a')")
    again.close()
    with pytest.raises(StoreError, match="run the newer version"):
        Database(path, _ONE)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.sqlite").write_text("not a database, and long enough to be read as a header" * 20)
    with pytest.raises(StoreError, match="cannot open the store"):
        Database(str(tmp_path / "a.sqlite"), _ONE)


def test_a_full_disk_refuses_the_transaction_and_keeps_what_was_there(tmp_path: Path) -> None:
    database = Database(str(tmp_path / "a.sqlite"), _ONE)
    database.run("INSERT INTO t VALUES (1)")
    ((pages,),) = database.run("PRAGMA page_count")
    database.run(
        f"PRAGMA max_page_count = {pages}"
    )  # SQLite's own stand-in for a disk without room (SQLITE_FULL)

    def fill() -> None:
        with database.transaction():
            for number in range(100_000):
                database.run("INSERT INTO t VALUES (?)", number)

    with pytest.raises(StoreError, match="full"):
        fill()
    assert database.run("SELECT x FROM t") == [(1,)]
    database.close()


def test_a_locked_store_is_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caesura.runtime.database._BUSY_TIMEOUT_S", 0.05)
    path = str(tmp_path / "a.sqlite")
    database = Database(path, _ONE)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    def write() -> None:
        with database.transaction():
            database.run("INSERT INTO t VALUES (1)")

    with pytest.raises(StoreError, match="locked"):
        write()
    assert "locked" in database.ping(), "it answers questions, and that is not enough"
    other.close()
    assert database.ping() == ""
    write()
    database.close()


def test_a_state_folder_has_one_user(tmp_path: Path) -> None:
    with exclusive_lock(str(tmp_path / "state")):
        with pytest.raises(InUse, match="in use by another process"), exclusive_lock(str(tmp_path / "state")):
            pass
        assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    with exclusive_lock(str(tmp_path / "state")):
        pass


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StateFolderUnusable, match="cannot use the state folder"),
        exclusive_lock(str(tmp_path / "file" / "below")),
    ):
        pass
    with pytest.raises(StateFolderUnusable, match=r"cannot use the state folder .*/file/below: "):
        private_dir(str(tmp_path / "file" / "below"))


def test_a_private_folder_is_nobody_elses(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    for name in ("open", "new/below"):
        assert private_dir(str(tmp_path / name)).stat().st_mode & 0o777 == 0o700
