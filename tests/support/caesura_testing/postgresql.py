"""A real PostgreSQL, and a replica of it, in a folder of its own: made by initdb, run as an unprivileged user, gone in the end."""

from __future__ import annotations

import asyncio
import atexit
import grp
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from caesura.bus.local_broker import free_port
from caesura_testing.patience import patient

_CONFIG = """
listen_addresses = '127.0.0.1'
max_connections = 20
shared_buffers = 16MB
wal_level = replica
max_wal_senders = 4
hot_standby = on
fsync = on
full_page_writes = on
synchronous_commit = on
logging_collector = off
autovacuum_naptime = 1h
"""

_template: Path | None = None


def programs() -> Path | None:
    """The folder with the newest initdb and pg_ctl of Debian, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda each: int(each.parts[4]))
    return found[-1].parent if found else None


class PostgresServer:
    """One server. ``async with`` starts it and removes it.

    Args:
        password: of the user ``caesura``, asked of connections over TCP; empty: none is.
    """

    def __init__(self, *, password: str = "") -> None:
        found = programs()
        assert found is not None
        self._bin = found
        self.folder = Path(tempfile.mkdtemp(prefix="caesura-pg-", dir="/tmp"))
        self.data = self.folder / "data"
        self.port = free_port()
        self.password = password
        self._process: asyncio.subprocess.Process | None = None
        self._user = _unprivileged()
        if self._user is not None:
            os.chown(self.folder, *self._user)

    @property
    def url(self) -> str:
        """As a coordinator's setting."""
        return f"postgresql://caesura@127.0.0.1:{self.port}/caesura"

    @property
    def pid(self) -> int:
        """The server's first process.

        Raises:
            AssertionError: it does not run.
        """
        assert self._process is not None
        return self._process.pid

    async def __aenter__(self) -> Self:
        await self._copy_template()
        self._configure(f"{_CONFIG}port = {self.port}\nunix_socket_directories = '{self.folder}'\n")
        if self.password:
            (self.data / "pg_hba.conf").write_text(
                "local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\nhost replication all 127.0.0.1/32 trust\n"
            )
        await self.start()
        if self.password:
            await self.sql(f"ALTER ROLE caesura PASSWORD '{self.password}'")
        return self

    async def _copy_template(self) -> None:
        """The files of a server with the role and an empty database: made once in this process."""
        global _template  # noqa: PLW0603 - a cache
        if _template is None:
            self.data = self.folder / "template"
            await self._run(
                "initdb", "-D", str(self.data), "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8"
            )
            settings = f"unix_socket_directories = '{self.folder}'\nport = {self.port}\nlisten_addresses = ''\nfsync = off\n"
            (self.data / "postgresql.auto.conf").write_text(settings)
            await self.start()
            await self.sql("CREATE ROLE caesura LOGIN", database="postgres")
            await self.sql("CREATE DATABASE caesura OWNER caesura", database="postgres")
            await self.stop()
            (self.data / "postgresql.auto.conf").write_text("")
            kept = Path(tempfile.mkdtemp(prefix="caesura-pg-template-", dir="/tmp"))
            atexit.register(shutil.rmtree, kept, ignore_errors=True)
            await self._as_root("cp", "-a", str(self.data), f"{kept}/data")
            _template = kept / "data"
            self.data = self.folder / "data"
        await self._as_root("cp", "-a", str(_template), str(self.data))

    @staticmethod
    async def _as_root(*words: str) -> None:
        process = await asyncio.create_subprocess_exec(*words)
        assert await process.wait() == 0

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop it at once, and remove its folder."""
        await self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def start(self) -> None:
        """Start it, and wait until it takes connections."""
        log = (self.folder / "log").open("ab")
        self._process = await asyncio.create_subprocess_exec(
            str(self._bin / "postgres"),
            "-D",
            str(self.data),
            stdout=log,
            stderr=log,
            start_new_session=True,
            **self._as_user(),  # type: ignore[arg-type]
        )
        log.close()
        async with asyncio.timeout(patient(30)):
            while not await self._answers():
                assert self._process.returncode is None, (self.folder / "log").read_text()
                await asyncio.sleep(0.02)

    async def with_tls(self) -> Path:
        """Take connections with TLS too, from now on; the certificate, for 127.0.0.1, which is its own authority."""
        certificate, key = self.data / "server.crt", self.data / "server.key"
        await self._run_program(
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
            "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate),
        )  # fmt: skip
        key.chmod(0o600)
        await self.sql("ALTER SYSTEM SET ssl = on", database="postgres")
        await self.stop()
        await self.start()
        return certificate

    async def stop(self) -> None:
        """An orderly, fast shutdown: sessions are ended."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        async with asyncio.timeout(patient(30)):
            await self._process.wait()

    async def kill(self) -> None:
        """As a crash."""
        if self._process is None or self._process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGCONT)
            self._process.send_signal(signal.SIGQUIT)
        try:
            async with asyncio.timeout(10):
                await self._process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()

    async def replica(self) -> PostgresServer:
        """A streaming replica that this server's commits wait for; not yet entered: ``start`` and ``close`` it."""
        other = PostgresServer(password=self.password)
        await self._run(
            "pg_basebackup", "-D", str(other.data), "-h", str(self.folder), "-p", str(self.port), "-U", "postgres",
            "-R", "-X", "stream", "-c", "fast", "--no-sync",
        )  # fmt: skip
        other._configure(
            f"port = {other.port}\nunix_socket_directories = '{other.folder}'\n"
            f"primary_conninfo = 'host={self.folder} port={self.port} user=postgres application_name=replica'\n"
        )
        # What -R wrote would come later in the order of files, and has no application_name.
        auto = other.data / "postgresql.auto.conf"
        auto.write_text(
            "".join(line for line in auto.read_text().splitlines(keepends=True) if "primary" not in line)
        )
        await other.start()
        await self.sql("ALTER SYSTEM SET synchronous_standby_names = 'replica'", database="postgres")
        await self.sql("SELECT pg_reload_conf()", database="postgres")
        async with asyncio.timeout(patient(30)):
            while "sync" not in await self.sql(  # noqa: ASYNC110
                "SELECT sync_state FROM pg_stat_replication", database="postgres"
            ):
                await asyncio.sleep(0.05)
        return other

    async def promote(self) -> None:
        """Make a replica a primary."""
        await self.sql("SELECT pg_promote()", database="postgres")

    @asynccontextmanager
    async def small_disk(self, size_bytes: int) -> AsyncIterator[Path]:
        """A disk of this size, which has the coordinators' tables while the block runs; as root. Gives its folder."""
        folder = self.folder / "small"
        place = folder / "tables"
        folder.mkdir()
        await self._as_root("mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder))
        try:
            place.mkdir()
            if self._user is not None:
                os.chown(place, *self._user)
            await self.sql(f"CREATE TABLESPACE small LOCATION '{place}'")
            names = await self.sql(
                "SELECT tablename FROM pg_tables WHERE schemaname = 'caesura' AND tablename <> 'store'"
            )
            for each in names.splitlines():
                await self.sql(f"ALTER TABLE caesura.{each} SET TABLESPACE small")
            yield folder
        finally:
            await self.kill()
            await self._as_root("umount", str(folder))

    async def sql(self, statement: str, *, database: str = "caesura") -> str:
        """Run a statement as the superuser; what psql prints of it, unaligned."""
        return await self._run(
            "psql", "-h", str(self.folder), "-p", str(self.port), "-U", "postgres", "-d", database, "-XAtq",
            "-v", "ON_ERROR_STOP=1", "-c", statement,
        )  # fmt: skip

    def _configure(self, lines: str) -> None:
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(lines)

    async def _answers(self) -> bool:
        with suppress(subprocess.CalledProcessError):
            await self._run("pg_isready", "-h", str(self.folder), "-p", str(self.port))
            return True
        return False

    async def _run(self, program: str, *words: str) -> str:
        return await self._run_program(str(self._bin / program), *words)

    async def _run_program(self, program: str, *words: str) -> str:
        process = await asyncio.create_subprocess_exec(
            program,
            *words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.folder,
            **self._as_user(),  # type: ignore[arg-type]
        )
        out, error = await process.communicate()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, program, out, error)
        return out.decode().strip()

    def _as_user(self) -> dict[str, object]:
        return {"user": self._user[0], "group": self._user[1], "extra_groups": []} if self._user else {}


def _unprivileged() -> tuple[int, int] | None:
    """Whom to run as: initdb and the server refuse root."""
    if os.geteuid():
        return None
    try:
        known = pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody").pw_uid, grp.getgrnam("nogroup").gr_gid
    return known.pw_uid, known.pw_gid
