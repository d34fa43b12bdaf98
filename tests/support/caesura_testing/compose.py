"""A compose project in an engine of the tests' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from caesura_testing.containers import Engine, Result


class Project:
    """One compose project: ``docker compose`` with its file and its variables.

    Args:
        engine: where it runs.
        folder: where ``docker-compose.yml`` is.
        name: of the project.
        environ: its variables.
        without: services that are left out because there is no image for them.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        name: str,
        environ: Mapping[str, str],
        *,
        without: Sequence[str] = (),
    ) -> None:
        self.engine = engine
        self.folder = folder
        self.name = name
        self.environ = dict(environ)
        listed = self.run("config", "--services").out.split()
        self.services = [service for service in listed if service not in without]

    def run(self, *words: str, check: bool = True, timeout_s: float = 300.0) -> Result:
        """``docker compose`` with these words."""
        return self.engine.run(
            "compose",
            "--ansi=never",
            "--progress=plain",
            "-p",
            self.name,
            *words,
            cwd=self.folder,
            environ=self.environ,
            check=check,
            timeout_s=timeout_s,
        )

    def up(self, *words: str, check: bool = True, timeout_s: float = 300.0) -> Result:
        """Start all services there are images for, and wait until they are well."""
        return self.run("up", "-d", "--wait", *words, *self.services, check=check, timeout_s=timeout_s)

    def container(self, service: str) -> str:
        """Id of a service's container."""
        return self.run("ps", "-aq", service).out.strip()

    def inspect(self, service: str, template: str) -> str:
        """A Go template over ``docker inspect`` of a service's container."""
        return self.engine.run("inspect", "-f", template, self.container(service)).out.strip()

    def logs(self, service: str) -> str:
        """What a service said so far."""
        done = self.run("logs", "--no-color", "--no-log-prefix", service)
        return done.out + done.err

    def processes(self, service: str) -> list[int]:
        """The processes of a service's container, as this machine numbers them; none while it does not run."""
        done = self.engine.run("top", self.container(service), "-eo", "pid", check=False)
        return [int(word) for word in done.out.split()[1:]] if done.code == 0 else []
