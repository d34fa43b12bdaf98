"""The planted mutations fit the code as it is now, and cover every rule; ``./check mutation`` plants them."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def lane() -> ModuleType:
    path = _ROOT / "tests/mutation/run.py"
    spec = importlib.util.spec_from_file_location("caesura_mutation_lane", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # msgspec resolves annotations through it
    spec.loader.exec_module(module)
    return module


def test_every_mutation_can_be_planted(lane: ModuleType) -> None:
    assert lane.unfit(lane.load()) == []


def test_every_rule_and_every_part_of_the_suite_has_mutations(lane: ModuleType) -> None:
    mutations = lane.load()
    assert len(mutations) >= 40
    assert [name for name, times in Counter(each.id for each in mutations).items() if times > 1] == []
    assert {each.invariant for each in mutations} == {f"I{number}" for number in range(1, 13)}
    parts = {"/".join(each.file.split("/")[:2]) for each in mutations}
    assert parts >= {
        "services/caesura_coordinator",
        "services/caesura_host_updater",
        "services/caesura_metadata_publisher",
        "services/caesura_metrics_exporter",
        "services/caesura_vm_agent",
        "shared/caesura",
    }
    assert any(each.file.startswith("services/caesura_pause_guard/") for each in mutations)


def test_mutated_files_are_still_python(lane: ModuleType) -> None:
    """A defect that does not even import is killed by anything and shows nothing."""
    for each in lane.load():
        text = (_ROOT / each.file).read_text(encoding="utf-8")
        ast.parse(text.replace(each.old, each.new), filename=each.id)


def test_a_mutation_whose_text_is_out_of_date_is_named(lane: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n", encoding="utf-8")
    (tmp_path / "test_a.py").touch()

    def mutation(name: str, old: str, file: str = "a.py", test: str = "test_a.py") -> object:
        return lane.Mutation(
            id=name, invariant="I1", what="w", file=file, old=old, new="x = 2", tests=(f"{test}::test_x",)
        )

    assert lane.unfit([mutation("twice", "x = 1\nx")], tmp_path) == []
    for each, words in (
        (mutation("gone", "y = 1"), "gone: its text is 0 times in a.py"),
        (mutation("twice", "x = 1"), "twice: its text is 2 times in a.py"),
        (mutation("nowhere", "x = 1\nx", file="b.py"), "nowhere: there is no file b.py"),
        (mutation("untested", "x = 1\nx", test="test_b.py"), "untested: there is no test file test_b.py"),
    ):
        (why,) = lane.unfit([each], tmp_path)
        assert why.startswith(words)
