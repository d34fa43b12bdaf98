"""One engine and one project for the whole scenario: a copy of what the checkout ships, brought up as a newcomer would."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from caesura.bus.local_broker import free_port
from caesura_testing.compose import Project
from caesura_testing.containers import Engine, default_cache, engine, missing_tools
from caesura_testing.fake_images import WITHOUT_STAND_IN, build_stand_ins, compose_plugin
from caesura_testing.fleet import Fleet

_ROOT = Path(__file__).parents[3]
_SHIPPED = (
    "docker-compose.yml",
    ".dockerignore",
    "pyproject.toml",
    "uv.lock",
    "README.md",
    "LICENSE",
    "deploy",
    "grafana",
    "services",
    "shared",
    "tools",
)


@pytest.fixture(scope="session")
def docker() -> Iterator[Engine]:
    if missing := missing_tools():
        pytest.skip(missing)
    cache = default_cache()
    with engine(cache, compose_plugin(cache)) as found:
        build_stand_ins(found, cache)
        yield found


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a fresh clone has: no .env, no .venv, nothing that was made before. Made under umask 077."""
    folder = tmp_path_factory.mktemp("clone")
    for name in _SHIPPED:
        source = _ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules")
            )
        else:
            shutil.copy2(source, folder / name)
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & 0o700)
    return folder


@pytest.fixture(scope="session")
def fleet(docker: Engine, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    ports = {name: free_port() for name in ("BROKER", "EXPORTER", "PROMETHEUS", "GRAFANA")}
    variables = {f"CAESURA_PORT_{name}": str(port) for name, port in ports.items()}
    # The first rollout starts by itself; the tests start the others.
    project = Project(
        docker,
        checkout,
        "caesura-e2e",
        {**variables, "CAESURA_ROLLOUT_PAUSE": "3600"},
        without=WITHOUT_STAND_IN,
    )
    found = Fleet(project, ports, tmp_path_factory.mktemp("operator"))
    try:
        yield found
    finally:
        project.run("--profile", "ha", "down", "--volumes", "--timeout", "60", check=False)


@pytest.fixture(autouse=True)
def free_sets(request: pytest.FixtureRequest) -> Iterator[None]:
    """One failure is one failure: what a failed test left under way is given up."""
    before = request.session.testsfailed
    yield
    if request.session.testsfailed > before and "fleet" in request.fixturenames:
        with suppress(Exception):  # the test's own failure is what is told
            request.getfixturevalue("fleet").give_up()
