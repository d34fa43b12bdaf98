"""An installed wheel against the checkout: every file of the packages is in it, as it is, and every module can be imported there.

Run by the interpreter of an environment that has the wheel and what it requires, nothing of the development dependencies:
``VENV/bin/python tests/architecture/installed.py``. With both the wheel does what the tests show of the checkout.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_SOURCES = ("services", "shared", "tools")


def files() -> Iterator[Path]:
    """Every tracked file of the packages, as the wheel has it: below the folder that holds the packages."""
    listed = subprocess.run(
        ("git", "ls-files", "-z", *_SOURCES), cwd=_ROOT, capture_output=True, check=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        yield Path(name)


def main() -> int:
    """Print what is wrong; 1 if anything is."""
    installed = Path(sysconfig.get_path("purelib"))
    wrong, modules = [], []
    for path in files():
        inside = Path(*path.parts[1:])
        there = installed / inside
        if not there.is_file():
            wrong.append(f"{path} is not in the wheel")
        elif there.read_bytes() != (_ROOT / path).read_bytes():
            wrong.append(f"{path} is another one in the wheel")
        elif path.suffix == ".py" and path.stem != "__main__":
            modules.append(".".join(inside.with_suffix("").parts).removesuffix(".__init__"))
    for name in modules:
        try:
            found = importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - whatever a module raises that cannot be imported
            wrong.append(f"{name} cannot be imported: {type(error).__name__}: {error}")
        else:
            if not str(found.__file__).startswith(str(installed)):
                wrong.append(f"{name} is not the wheel's: {found.__file__}")
    print(*wrong, sep="\n", end="\n" if wrong else "")  # noqa: T201 - its answer
    print(f"{len(modules)} modules, {len(wrong)} wrong")  # noqa: T201
    return 1 if wrong or not modules else 0


if __name__ == "__main__":
    sys.exit(main())
