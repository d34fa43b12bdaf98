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
import yaml
from click.testing import CliRunner

from caesura_ctl.cli import caesura
from caesura_host_updater.inventory.host_config import parse_host_file
from caesura_host_updater.inventory.updates import UpdateFile, parse_update
from caesura_metadata_publisher.listeners import parse_listeners
from caesura_rehearse.scenarios.reader import parse_scenario
from caesura_testing.patience import patient

_ROOT = Path(__file__).parents[2]
_PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *(str(path.relative_to(_ROOT)) for path in sorted((_ROOT / "docs").rglob("*.md"))),
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
        elif re.search(r"^\s*host = ", content, re.MULTILINE):
            kinds.append("host")
            file = parse_host_file(content, page)
            assert file.vm or file.driver in ("libvirt", "proxmox")  # whose VMs are found
        elif "[[step]]" in content:
            kinds.append("scenario")
            assert parse_scenario(content, page).steps
        else:
            kinds.append("update")
            assert isinstance(parse_update(page, content, find=lambda program: program), UpdateFile)
    assert set(kinds) == {"listeners", "host", "update", "scenario"}


def test_the_example_of_a_driver_that_is_shown_is_the_one_that_is_tested() -> None:
    code = text("tests/support/caesura_testing/example_driver.py") + text(
        "tests/integration/driver_author/test_example_driver.py"
    )
    shown = [body for page, body in blocks("python") if page == "docs/develop/driver.md"]
    assert len(shown) == 4
    for body in shown:
        assert body in code


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words after `caesura`) of every call of the operator's command in a shell block or in running text."""
    lines = [(page, line) for page, body in blocks("sh") for line in body.splitlines()]
    lines += [
        (page, line)
        for page in _PAGES
        for line in re.findall(r"`((?:\.venv/bin/)?caesura [^`]*)`", text(page))
    ]
    for page, line in lines:
        # `users` is a shell variable of the page; what it holds is in the line that sets it.
        plain = line.replace("$users", "coordinator vm:web-1:web").replace("\n", " ").strip()
        found = re.match(
            r"(?:for .* in \$\()?(?:docker compose run --rm )?(?:\.venv/bin/)?caesura ([a-z].*)", plain
        )
        if found:
            yield page, shlex.split(re.sub(r"\)?;.*|>.*|\s&.*", "", found[1]), comments=True)


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
    install = text("docs/install.md")
    assert "`coordinator:NAME`" in install
    assert "`exporter:NAME`" in install
    rules = CliRunner().invoke(caesura, ["acl", "coordinator:standby", "exporter:alice"]).output
    standby, consumer = (each.splitlines() for each in rules.split("\n\n")[1:])
    assert standby[0] == "user coordinator_standby"
    assert "topic write caesura/v1/fleet/rollout/+" in standby
    assert consumer[0] == "user exporter_alice"
    assert [line for line in consumer if "write" in line] == ["topic write caesura/v1/exporter/alice/resync"]


def anchors(page: str) -> set[str]:
    """Anchors of a page's headings, as a hosting site and MkDocs both make them."""
    whole = _FENCE.sub("", text(page))
    return {
        re.sub(r"[-\s]+", "-", re.sub(r"[^\w\- ]", "", heading.lower()))
        for heading in re.findall(r"^#+ (.*)$", whole, re.MULTILINE)
    }


@pytest.mark.parametrize("page", _PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """MkDocs checks the same for the site; these are also links of the pages as files, README included."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = ((_ROOT / page).parent / path).resolve() if path else _ROOT / page
        assert file.exists(), f"{page}: {target} does not exist"
        if anchor:
            assert anchor in anchors(str(file.relative_to(_ROOT))), f"{page}: no heading for {target}"


def test_every_alert_has_its_runbook_and_every_runbook_is_in_the_list() -> None:
    rules = yaml.safe_load(text("deploy/prometheus/rules/alerts.yml"))
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    folder = _ROOT / "docs" / "operate" / "runbooks"
    pages = {path.stem for path in folder.glob("*.md")} - {"index"}
    assert {page for page in pages if page.startswith("Caesura")} == set(alerts)
    listed = re.findall(r"^\| \[.*?\]\(([\w-]+)\.md\)", text("docs/operate/runbooks/index.md"), re.MULTILINE)
    assert sorted(listed) == sorted(pages)
    assert [name for name in listed if name in alerts] == list(dict.fromkeys(alerts)), (
        "in the order of the rules"
    )
    for alert in alerts:
        headings = re.findall(r"^#+ (.*)$", text(f"docs/operate/runbooks/{alert}.md"), re.MULTILINE)
        assert headings == [alert, "Meaning", "Impact", "What to do", "When it ends"], alert


def test_decisions_have_a_status_and_a_date_and_are_in_the_list() -> None:
    listed = re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", text("docs/adr/index.md"))
    found = sorted(path.name for path in (_ROOT / "docs" / "adr").glob("0*.md"))
    assert listed == found
    for name in found:
        assert re.match(
            r"# \d+\. .+\n\n\*\*Status\.\*\* (Accepted|Superseded by ADR \d+), \d{4}-\d\d-\d\d\.\n",
            text(f"docs/adr/{name}"),
        ), name


_SOURCES = ("services", "shared", "deploy", "grafana", "examples", "benchmarks", "tests")
_TEXTS = {
    ".py",
    ".sh",
    ".toml",
    ".yml",
    ".yaml",
    ".conf",
    ".env",
    ".service",
    ".js",
    ".html",
    ".json",
    ".example",
}


def sources() -> Iterator[tuple[Path, str]]:
    """Every text file outside the docs that may name a page, with string literals that were broken over lines put together."""
    names = ("docker-compose.yml", "check", "demo", "mkdocs.yml", "pyproject.toml", ".ci/run")
    paths = [_ROOT / name for name in names]
    for folder in _SOURCES:
        paths += [path for path in (_ROOT / folder).rglob("*") if path.suffix in _TEXTS | {""}]
    for path in paths:
        if path.is_file() and not {"node_modules", "__pycache__", "released", "versions"} & set(path.parts):
            yield path, re.sub(r'"\n\s+f?"', "", path.read_text(encoding="utf-8"))


def test_pages_and_headings_that_code_and_configuration_name_exist() -> None:
    """An error says "see 'A VM has two hosts' in docs/...": who reads it in the night must find that."""
    pages, headings = set(), 0
    for path, whole in sources():
        if path.name == Path(__file__).name:
            continue
        for page in re.findall(r"(?<![\w/.-])(docs/[\w/.-]+\.(?:md|yaml|py))", whole):
            assert (_ROOT / page).is_file(), f"{path.relative_to(_ROOT)}: {page} does not exist"
            pages.add(page)
        for heading, page in re.findall(r"""['"]([^'"\n]{3,60})['"] in (docs/[\w/-]+\.md)""", whole):
            found = re.findall(r"^#+ (.*)$", text(page), re.MULTILINE)
            assert heading in found, f"{path.relative_to(_ROOT)}: {page} has no heading {heading!r}"
            headings += 1
    assert len(pages) > 20
    assert headings >= 6


@pytest.mark.parametrize("page", _PAGES)
def test_files_named_exist(page: str) -> None:
    for name in re.findall(r"`((?:deploy|docs|examples|tests|shared|services)/[\w./-]+)`", text(page)):
        assert (_ROOT / name).exists(), f"{page}: {name} does not exist"


def test_architecture_has_one_figure_and_names_a_real_test_for_every_invariant() -> None:
    page = text("docs/architecture.md")
    assert len(re.findall(r"^!\[[^\]]{40,}\]\(images/services\.svg\)$", page, re.MULTILINE)) == 1
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
    """``./demo`` makes an environment without playwright, and docs/getting-started.md names the script after it."""
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
    page = text("docs/develop/rehearse.md")
    started = re.findall(r"^(caesura-.* &)$", page, re.MULTILINE)
    jobs = 1 + sum(line.count("&") for line in started)  # the broker is the first
    (ended,) = re.findall(r"`kill ([%\d ]+)`", page)
    assert sorted(ended.split()) == [f"%{number + 1}" for number in range(jobs)]
