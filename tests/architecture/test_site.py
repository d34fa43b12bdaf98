"""The lane ``docs`` of ./check notices what it is for: a build that cannot fail would let every link rot."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from caesura_testing.lanes import LANES
from caesura_testing.patience import patient

_ROOT = Path(__file__).parents[2]


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """The lane's own command, in ``folder``."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["sh", "-euc", LANES["docs"].script],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=patient(120),
        check=False,
    )


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """Two pages of a site with the configuration of ours."""
    if shutil.which("mkdocs", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("mkdocs is not installed: uv sync --locked --all-extras --group docs, as ./check does")
    config = (_ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[0]
    (tmp_path / "mkdocs.yml").write_text(f"{config}\nnav: [index.md, other.md]\n", encoding="utf-8")
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(_ROOT / "docs" / "site.css", docs)
    (docs / "index.md").write_text("# One\n\n[two](other.md#a-heading)\n", encoding="utf-8")
    (docs / "other.md").write_text("# Two\n\n## A heading\n", encoding="utf-8")
    return tmp_path


def test_a_site_without_faults_is_built_and_fetches_nothing(pages: Path) -> None:
    done = build(pages)
    assert done.returncode == 0, done.stderr
    html = (pages / ".lanes" / "site" / "index.html").read_text(encoding="utf-8")
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(https?://[^\" >]+)", html)
    assert loaded == [], "by the reader's browser"


def test_each_broken_link_or_anchor_and_a_page_outside_the_navigation_fail_the_lane(pages: Path) -> None:
    """In one build, which takes most of a second: it says how many of them count."""
    faults = {
        "[gone](gone.md)": "'gone.md'",
        "[gone](other.md#gone)": "'other.md#gone'",
        "[gone](#gone)": "'#gone'",
        "[absolute](/other.md)": "'/other.md'",
    }
    (pages / "docs" / "index.md").write_text("# One\n\n" + "\n\n".join(faults), encoding="utf-8")
    (pages / "docs" / "lost.md").write_text("# Lost\n", encoding="utf-8")
    done = build(pages)
    assert done.returncode != 0
    for named in (*faults.values(), "lost.md"):
        assert named in done.stderr, named
    assert "Aborted with 5 warnings in strict mode" in done.stdout + done.stderr
