"""``python -m grafana.generate --write|--check``, from the root of the checkout.

Writes the dashboards' JSON, or lists the files that differ from the generated ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from grafana.generate.domain import domain
from grafana.generate.health import health
from grafana.generate.overview import overview
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

_FOLDER = Path(__file__).parents[1] / "dashboards"


def dashboards() -> Mapping[str, Dashboard]:
    """Maps a file name to its dashboard."""
    return {
        "overview.json": overview(),
        "update-domain.json": domain(),
        "suite-health.json": health(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 written or fresh, 1 stale."""
    parser = argparse.ArgumentParser(prog="python -m grafana.generate", description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="write the files")
    mode.add_argument("--check", action="store_true", help="fail when a file is missing, stale or too many")
    parser.add_argument("--folder", type=Path, default=_FOLDER, help="where they are (default: %(default)s)")
    arguments = parser.parse_args(argv)
    wanted = {name: json.dumps(each, cls=JSONEncoder, indent=2) + "\n" for name, each in dashboards().items()}
    found = {path.name: path.read_text(encoding="utf-8") for path in arguments.folder.glob("*.json")}
    stale = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if arguments.check:
        if stale:
            sys.stderr.write(f"stale: {', '.join(stale)}; run: python -m grafana.generate --write\n")
        return 1 if stale else 0
    for name in stale:
        path = arguments.folder / name
        if name in wanted:
            path.write_text(wanted[name], encoding="utf-8")
        else:
            path.unlink()
    sys.stdout.write(f"wrote {len(wanted)} dashboards, {len(stale)} changed\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
