"""A package of ours is a folder; where a tool needs a list of them, the list is held to the folders."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).parents[2]
_PYPROJECT: dict[str, Any] = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
_SOURCES = ("services", "shared", "tools")
"""The source roots: the wheel, mypy and ruff know these, and no package."""


def packages(*sources: str) -> set[str]:
    """The folders with Python code in them, below these source roots."""
    return {
        folder.name for source in sources for folder in (_ROOT / source).iterdir() if any(folder.glob("*.py"))
    }


def differences(what: str, listed: set[str], wanted: set[str]) -> list[str]:
    """Sentences for people; none where both are the same."""
    return [
        *(f"{name} is missing in {what}" for name in sorted(wanted - listed)),
        *(f"{what} has {name}, which has no folder" for name in sorted(listed - wanted)),
    ]


def layers() -> list[set[str]]:
    """The layers of the packages, the highest first."""
    (contract,) = (
        each
        for each in _PYPROJECT["tool"]["importlinter"]["contracts"]
        if each["type"] == "layers" and "caesura_vmcontrol" in each["layers"]
    )
    return [set(layer.replace("|", " ").replace(":", " ").split()) for layer in contract["layers"]]


def test_the_import_contracts_know_every_package() -> None:
    tools, services, *shared = layers()
    found = [
        *differences(
            "root_packages of [tool.importlinter]",
            set(_PYPROJECT["tool"]["importlinter"]["root_packages"]),
            packages(*_SOURCES),
        ),
        *differences("the layer of the tools in [tool.importlinter]", tools, packages("tools")),
        *differences("the layer of the services in [tool.importlinter]", services, packages("services")),
        *differences(
            "the layers of shared code in [tool.importlinter]", set.union(*shared), packages("shared")
        ),
    ]
    assert not found, "\n".join(found)


_LIBRARIES = {"caesura_nested_host"}
"""Tools without a command: what the demo, the tests and a benchmark share."""


def test_every_service_is_a_command_and_every_tool_a_plug_in_of_one() -> None:
    project = _PYPROJECT["project"]
    commands = {target.partition(".__main__:main")[0] for target in project["scripts"].values()}
    plug_ins = {target.partition(".")[0] for target in project["entry-points"]["caesura.commands"].values()}
    found = [
        *differences("[project.scripts]", commands, packages("services")),
        *differences('[project.entry-points."caesura.commands"]', plug_ins | _LIBRARIES, packages("tools")),
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("tool", "roots"),
    [
        ("hatch.build.targets.wheel.sources", _PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["sources"]),
        ("hatch.build.targets.wheel.only-include", _PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]),
        ("hatch.build.dev-mode-dirs", _PYPROJECT["tool"]["hatch"]["build"]["dev-mode-dirs"]),
        ("ruff.src", _PYPROJECT["tool"]["ruff"]["src"]),
        ("mypy.mypy_path", _PYPROJECT["tool"]["mypy"]["mypy_path"].split(",")),
        ("mypy.files", _PYPROJECT["tool"]["mypy"]["files"]),
    ],
)  # fmt: skip
def test_other_tools_know_source_roots_only(tool: str, roots: list[str]) -> None:
    assert set(_SOURCES) <= set(roots), f"[tool.{tool}] lacks {set(_SOURCES) - set(roots)}"
    named = {root for root in roots if Path(root).parts[0] in _SOURCES} - set(_SOURCES)
    assert not named, f"[tool.{tool}] names {named}: the source root is enough"


@pytest.mark.parametrize("package", sorted(packages(*_SOURCES)))
def test_every_package_says_that_it_is_typed(package: str) -> None:
    (folder,) = (_ROOT / source / package for source in _SOURCES if (_ROOT / source / package).is_dir())
    for name in ("__init__.py", "py.typed"):
        assert (folder / name).is_file(), f"{folder.relative_to(_ROOT)} lacks {name}"


def test_a_folder_that_is_missing_in_a_list_is_named() -> None:
    listed = packages("services") - {"caesura_coordinator"} | {"caesura_renamed"}
    assert differences("the list", listed, packages("services")) == [
        "caesura_coordinator is missing in the list",
        "the list has caesura_renamed, which has no folder",
    ]
