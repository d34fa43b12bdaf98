"""The reader of ``updates.d``: when it reads, and that a folder which hangs holds up nothing."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from caesura_host_updater.inventory import catalogue_reader
from caesura_host_updater.inventory.catalogue_reader import CatalogueReader, fingerprint
from caesura_host_updater.inventory.updates import Catalogue, read_updates

UPDATE = (
    'name = "patch"\nimpact = "pause"\nscope = "host"\nargv = ["/bin/true"]\nexpected_s = 1\ntimeout_s = 5\n'
)


async def until(holds: Callable[[], bool]) -> None:
    """Wait for the thread."""
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - a thread's doing
            await asyncio.sleep(0.005)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a folder was looked at for changes."""
    counts: Counter[str] = Counter()

    def counted(folder: str) -> object:
        counts[folder] += 1
        return fingerprint(folder)

    monkeypatch.setattr(catalogue_reader, "fingerprint", counted)
    return counts


class Folder:
    """A reader of a folder that answers or hangs as the test says, and counts its reads."""

    def __init__(self, path: Path) -> None:
        self.reads = 0
        self.answers = threading.Event()
        self.answers.set()
        self.changes = 0
        self.reader = CatalogueReader(str(path), self._changed, read=self._read, look_s=0.01, silent_s=0.2)

    def _changed(self) -> None:
        self.changes += 1

    def _read(self, folder: str) -> Catalogue:
        self.reads += 1
        self.answers.wait()
        return read_updates(folder)


async def test_it_is_read_on_start_and_on_change_only(tmp_path: Path, looks: Counter[str]) -> None:
    (tmp_path / "patch.toml").write_text(UPDATE)
    folder = Folder(tmp_path)
    await folder.reader.start()
    assert list(folder.reader.catalogue.updates) == ["patch"]
    seen = looks.total()
    await until(lambda: looks.total() > seen + 5)
    assert folder.reads == 1, "nothing changed"
    (tmp_path / "part").write_text(UPDATE.replace("patch", "other"))
    (tmp_path / "part").replace(tmp_path / "patch.toml")
    await until(lambda: list(folder.reader.catalogue.updates) == ["other"])
    assert folder.reads == 2
    folder.reader.reread()
    await until(lambda: folder.reads == 3)
    folder.reader.close()


async def test_looks_before_the_loop_took_what_was_read_read_nothing_again(
    tmp_path: Path, looks: Counter[str]
) -> None:
    (tmp_path / "patch.toml").write_text(UPDATE)
    folder = Folder(tmp_path)
    starting = asyncio.create_task(folder.reader.start())
    await asyncio.sleep(0)
    while looks.total() < 5:  # the loop is held up: that is what is tested
        time.sleep(0.005)  # noqa: ASYNC251
    assert folder.reads == 1
    await starting
    folder.reader.close()


async def test_a_file_that_changes_in_the_middle_of_a_read_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "patch.toml").write_text(UPDATE)
    changed = False

    def read(folder: str) -> Catalogue:
        nonlocal changed
        found = read_updates(folder)
        if not changed:
            changed = True
            (tmp_path / "patch.toml").write_text(UPDATE.replace("patch", "later"))
        return found

    reader = CatalogueReader(str(tmp_path), lambda: None, read=read, look_s=0.01, silent_s=0.2)
    await reader.start()
    await until(lambda: list(reader.catalogue.updates) == ["later"])
    reader.close()


async def test_a_program_that_comes_later_is_noticed(tmp_path: Path) -> None:
    program = tmp_path / "program"
    (tmp_path / "patch.toml").write_text(UPDATE.replace("/bin/true", str(program)))
    folder = Folder(tmp_path)
    await folder.reader.start()
    assert folder.reader.catalogue.updates == {}
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    await until(lambda: list(folder.reader.catalogue.updates) == ["patch"])
    program.unlink()
    await until(lambda: folder.reader.catalogue.updates == {})
    folder.reader.close()


async def test_a_folder_that_hangs_holds_up_nothing_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "patch.toml").write_text(UPDATE)
    folder = Folder(tmp_path)
    await folder.reader.start()
    watching = asyncio.create_task(folder.reader.run())
    folder.answers.clear()
    with capture_logs() as said:
        folder.reader.reread()
        await until(lambda: bool(folder.reader.health_error()))
        await until(lambda: any(each["event"] == "updates.folder_silent" for each in said))
    assert "does not answer" in folder.reader.health_error()
    found = folder.reader.catalogue
    assert list(found.updates) == ["patch"], "what was last read stands"
    assert [each.file for each in found.refused] == [str(tmp_path)]
    before = folder.changes
    folder.answers.set()
    await until(lambda: not folder.reader.health_error() and folder.changes > before)
    assert folder.reader.catalogue.refused == ()
    watching.cancel()
    folder.reader.close()


async def test_a_folder_that_never_answers_does_not_keep_the_host_from_starting(tmp_path: Path) -> None:
    others = set(threading.enumerate())
    folder = Folder(tmp_path)
    folder.answers.clear()
    await folder.reader.start(patience_s=0.05)
    assert folder.reader.catalogue.updates == {}
    folder.reader.close()
    (hung,) = [each for each in threading.enumerate() if each.name == "updates.d" and each not in others]
    assert hung.daemon, "it must not keep the service from ending"
    folder.answers.set()
    await until(lambda: not hung.is_alive())


@pytest.mark.parametrize("kind", ["refused", "absent"])
async def test_what_is_wrong_is_said_at_the_start(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "updates.d"
    if kind == "refused":
        path.mkdir()
        (path / "slip.toml").write_text(UPDATE + "x =")
        os.mkfifo(path / "pipe.toml")
    folder = Folder(path)
    with capture_logs() as said:
        await folder.reader.start()
        await until(lambda: bool(said))
    folder.reader.close()
    if kind == "absent":
        assert [(each["event"], each["folder"]) for each in said] == [("updates.no_folder", str(path))]
        return
    assert [(each["log_level"], each["event"], each["file"], each["line"]) for each in said] == [
        ("warning", "updates.refused", "slip.toml", 7),
        ("warning", "updates.refused", "pipe.toml", 0),
    ]
