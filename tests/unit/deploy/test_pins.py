"""What is fetched while installing is one version, with its digest where one can be known without the registry."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[3]
_WHOLE = re.compile(r"(@sha256:[0-9a-f]{64}|:v?\d+\.\d+\.\d+[\w.-]*|^postgres:\d+\.\d+[\w.-]*)\Z")
"""A digest, or a version to the last number; PostgreSQL's have two."""


def text(path: str) -> str:
    return (_ROOT / path).read_text(encoding="utf-8")


def test_container_images_have_a_whole_version() -> None:
    images = re.findall(r"^\s+image: (\S+)$", text("docker-compose.yml"), re.MULTILINE)
    images += re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", text("deploy/Dockerfile"), re.MULTILINE)
    others = [each for each in images if not each.startswith("${CAESURA_IMAGE")]
    assert len(others) >= 4
    assert [each for each in others if not _WHOLE.search(each)] == []


@pytest.mark.parametrize("path", ["deploy/bootstrap.sh", "deploy/Dockerfile"])
def test_uv_is_installed_by_digest(path: str) -> None:
    installs = [line for line in text(path).splitlines() if "pip install" in line and "uv pip" not in line]
    assert installs
    for line in installs:
        assert "--require-hashes" in line
        assert "uv.txt" in line
    assert re.search(r"^uv==[\d.]+ \\$", text("deploy/uv.txt"), re.MULTILINE)
    assert text("deploy/uv.txt").count("--hash=sha256:") > 10, "for every platform"


def test_what_builds_the_wheel_is_one_version() -> None:
    project = tomllib.loads(text("pyproject.toml"))
    required = project["build-system"]["requires"]
    pinned = project["tool"]["uv"]["build-constraint-dependencies"]
    assert all("==" in each for each in (*required, *pinned))
    assert set(required) <= set(pinned)


@pytest.mark.parametrize(
    "page", ["README.md", *(str(path.relative_to(_ROOT)) for path in sorted((_ROOT / "docs").rglob("*.md")))]
)
def test_no_procedure_puts_a_password_on_a_command_line(page: str) -> None:
    """Every user of a machine can read the command lines of all its processes."""
    for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", text(page), re.DOTALL):
        for line in block.splitlines():
            if not line.lstrip().startswith("printf "):  # the shell's own: it starts no process
                assert not re.search(r"(\s-P\s|--password[ =]|mosquitto_passwd -b|--pw )", line), line
