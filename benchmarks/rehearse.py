"""How long ``caesura rehearse`` takes until it is ready, as a ratio to ``python -c "import aiohttp, msgspec"`` in the same run.

Ready: the program runs and its first request to the metadata API is answered. By turns, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

_PROGRAM = """
import os, time, urllib.request
url = os.environ["CAESURA_METADATA_URL"] + "/metadata/scheduledevents?api-version=2020-07-01"
urllib.request.urlopen(urllib.request.Request(url, headers={"Metadata": "true"})).read()
print(time.monotonic())
"""


def rehearse_s() -> float:
    """Seconds from the start of the command to the program's first answer."""
    began = time.monotonic()
    command = Path(sys.executable).with_name("caesura")
    argv = [command, "rehearse", "--", sys.executable, "-I", "-c", _PROGRAM]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    return float(done.stdout) - began


def python_s(script: str) -> float:
    """Seconds that the interpreter takes for a script, from start to end."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-I", "-c", script], check=True)
    return time.monotonic() - began


def main() -> None:
    """Print medians, and the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rounds = [
        (rehearse_s(), python_s("import aiohttp, msgspec"), python_s("import urllib.request"))
        for _ in range(arguments.rounds)
    ]
    ready, imports, client = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(ready / imports for ready, imports, _ in rounds)
    if arguments.json:
        print(json.dumps({"ready_s": ready, "imports_s": imports, "client_s": client, "ratio": ratio}))
        return
    print(
        f"ready after {ready:.3f} s, of which the program itself takes {client:.3f} s to start and import its HTTP client"
    )
    print(
        f"import aiohttp, msgspec: {imports:.3f} s; ratio {ratio:.2f} (median of {arguments.rounds} rounds)"
    )


if __name__ == "__main__":
    main()
