"""What the documents show must work: their files are read by the code that reads such files, their commands parsed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from caesura_ctl.cli import caesura
from caesura_host_updater.hostfile import parse_host_file
from caesura_host_updater.updates import UpdateFile, parse_update
from caesura_metadata_publisher.listeners import parse_listeners
from caesura_testing.patience import patient

_ROOT = Path(__file__).parents[2]
_PAGES = (
    "README.md",
    "docs/operations.md",
    "docs/operate/upgrade.md",
    "docs/architecture.md",
    "docs/compose.md",
    "docs/reliability.md",
    "CONTRIBUTING.md",
)
_FENCE = re.compile(r"^([ ]*)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_HEREDOC = re.compile(r"^cat >(\S+) <<'END'\n(.*?)^END$", re.DOTALL | re.MULTILINE)
_INVARIANTS = {f"I{number}" for number in range(1, 13)}


def text(page: str) -> str:
    return (_ROOT / page).read_text(encoding="utf-8")


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """(page, block) of every fenced block in this language."""
    for page in _PAGES:
        for _, found, body in _FENCE.findall(text(page)):
            if found == language:
                yield page, body


def files() -> Iterator[tuple[str, str]]:
    """(page, text) of every TOML file that is shown, as a block or as a here-document."""
    yield from blocks("toml")
    for page, body in blocks("sh"):
        for name, content in _HEREDOC.findall(body):
            if name.endswith(".toml"):
                yield page, content


def test_every_toml_file_shown_is_accepted_by_its_reader() -> None:
    kinds = []
    for page, content in files():
        if "[[listener]]" in content:
            kinds.append("listeners")
            assert parse_listeners(content, page)
        elif content.startswith("host"):
            kinds.append("host")
            assert parse_host_file(content, page).vm
        else:
            kinds.append("update")
            assert isinstance(parse_update(page, content, find=lambda program: program), UpdateFile)
    assert set(kinds) == {"listeners", "host", "update"}


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words after `caesura`) of every call of the operator's command in a shell block or in running text."""
    for page in _PAGES:
        whole = text(page)
        lines = [line for _, body in blocks("sh") for line in body.splitlines()] if page == _PAGES[0] else []
        lines += re.findall(r"`((?:\.venv/bin/)?caesura [^`]*)`", whole)
        for line in lines:
            # `users` is a shell variable of the page; what it holds is in the line that sets it.
            line = line.replace("$users", "coordinator vm:web-1:web").strip()  # noqa: PLW2901
            found = re.match(r"(?:for .* in \$\()?(?:\.venv/bin/)?caesura ([a-z].*)", line)
            if found:
                words = shlex.split(re.sub(r"\)?;.*|>.*|\s&.*", "", found[1]), comments=True)
                yield page, words


def test_every_command_shown_can_be_typed() -> None:
    seen = set()
    for page, words in commands():
        command = caesura.get_command(click.Context(caesura), words[0])
        assert command is not None, f"{page}: no command {words[0]!r}"
        seen.add(words[0])
        try:
            command.make_context(words[0], words[1:])
        except click.MissingParameter:
            assert len(words) == 1, f"{page}: {words} lacks something"  # a command that is only named
        except click.UsageError as error:
            pytest.fail(f"{page}: caesura {shlex.join(words)}: {error.message}")
    assert {"demo", "plan", "roll", "watch", "freeze", "resume", "abort", "status", "tail", "acl"} <= seen


def test_the_words_shown_give_a_standby_the_coordinators_rights_and_a_reader_none_to_write() -> None:
    operations = text("docs/operations.md")
    assert "`coordinator:NAME`" in operations
    assert "`exporter:NAME`" in operations
    rules = CliRunner().invoke(caesura, ["acl", "coordinator:standby", "exporter:alice"]).output
    standby, consumer = (each.splitlines() for each in rules.split("\n\n")[1:])
    assert standby[0] == "user coordinator_standby"
    assert "topic write caesura/v1/fleet/rollout/+" in standby
    assert consumer[0] == "user exporter_alice"
    assert not [line for line in consumer if "write" in line]


@pytest.mark.parametrize("page", _PAGES)
def test_links_lead_somewhere(page: str) -> None:
    whole = text(page)
    anchors = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", whole, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", whole):
        if target.startswith("#"):
            assert target[1:] in anchors, f"{page}: no heading for {target}"
        elif not target.startswith("http"):
            path, _, _ = target.partition("#")
            assert ((_ROOT / page).parent / path).exists(), f"{page}: {target} does not exist"


@pytest.mark.parametrize("page", _PAGES)
def test_files_named_exist(page: str) -> None:
    for name in re.findall(r"`((?:deploy|docs|examples|tests|shared|services)/[\w./-]+)`", text(page)):
        assert (_ROOT / name).exists(), f"{page}: {name} does not exist"


def test_architecture_has_one_figure_and_names_a_real_test_for_every_invariant() -> None:
    page = text("docs/architecture.md")
    assert len(re.findall(r"^```mermaid$", page, re.MULTILINE)) == 1
    rows = dict(re.findall(r"^\| (I\d+) \|(.*)\|$", page, re.MULTILINE))
    assert set(rows) == _INVARIANTS
    for invariant, row in rows.items():
        named = re.findall(r"`(tests/[\w/.-]+\.py)::(\w+)`", row)
        assert named, f"{invariant} names no test"
        for file, test in named:
            path = _ROOT / file
            assert path.is_file(), f"{invariant}: {file} does not exist"
            assert re.search(
                rf"(?:def {test}\(|^{test} = )", path.read_text(encoding="utf-8"), re.MULTILINE
            ), f"{invariant}: no {test} in {file}"
        for file in re.findall(r"`((?:services|shared)/[\w/.-]+)`", row):
            assert (_ROOT / file).exists(), f"{invariant}: {file} does not exist"


def test_every_row_of_reliability_names_a_real_test() -> None:
    """The page is the proof that a bug stays away: a test that was renamed must be renamed there too."""
    page = text("docs/reliability.md").partition("\n## The mutation lane")[0]
    rows = re.findall(r"^\| (.*) \|$", page, re.MULTILINE)
    rows = [row for row in rows if not row.startswith(("---", "Bug |", "Defect |"))]
    assert len(rows) >= 20
    for row in rows:
        named = re.findall(r"`(tests/[\w/.-]+\.py)(?:::(\w+))?`", row.split(" | ")[-1])
        assert named, f"no test in: {row}"
        for file, test in named:
            path = _ROOT / file
            assert path.is_file(), f"{file} does not exist"
            assert not test or re.search(rf"def {test}\(", path.read_text(encoding="utf-8")), (
                f"no {test} in {file}"
            )


def test_the_mutations_named_are_in_the_table() -> None:
    table = text("tests/mutation/mutations.toml")
    for row in re.findall(
        r"^\| .* \| (I\d.*?) \| (`.*?) \| `tests/.*$", text("docs/reliability.md"), re.MULTILINE
    ):
        for name in re.findall(r"`([\w-]+)`", row[1]):
            assert f'id = "{name}"' in table, name


def test_the_pictures_script_says_what_it_lacks(tmp_path: Path) -> None:
    """``./demo`` makes an environment without playwright, and README names the script after it."""
    script = str(_ROOT / "docs" / "take_pictures.py")
    without = f"import runpy, sys; sys.modules['playwright'] = None; runpy.run_path({script!r}, run_name='__main__')"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", without, *words],
            capture_output=True,
            text=True,
            timeout=patient(60),
            check=False,
        )

    helped = run("--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "--out" in helped.stdout
    lacking = run("--out", str(tmp_path))
    assert (lacking.returncode, len(lacking.stderr.splitlines())) == (2, 1)
    assert "playwright" in lacking.stderr
    assert "./check --fast" in lacking.stderr


def test_the_freeze_on_demand_page_ends_all_the_jobs_it_starts() -> None:
    page = text("docs/operations.md").partition("\n## Freeze on demand")[2].partition("\n## ")[0]
    started = re.findall(r"^(caesura-.* &)$", page, re.MULTILINE)
    jobs = 1 + sum(line.count("&") for line in started)  # the broker is the first
    (ended,) = re.findall(r"`kill ([%\d ]+)`", page)
    assert sorted(ended.split()) == [f"%{number + 1}" for number in range(jobs)]
