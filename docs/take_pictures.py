"""Takes the pictures of the live page from a real rollout: ``python docs/take_pictures.py``. Needs Chromium,
and the environment of ``./check``: that of ``./demo`` has no playwright.

Runs ``caesura demo``, opens the page that it names in a headless browser, light and dark, and takes the pictures while
the VMs of the third wave are paused.
"""

# ruff: noqa: INP001 - a script for developers, not a package

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.async_api import Page

_OUT = Path(__file__).parent / "images"
_MOMENT = "document.querySelectorAll('.waves li')[2]?.textContent.includes('frozen') ?? false"
_PATIENCE_S = 120.0
_INTO_THE_PAUSE_S = 1.6  # s: so that the bars have begun to fill


class TooLate(Exception):
    """What the pictures are to show was over before they were taken."""


async def take(out: Path) -> None:
    """One demo, two pictures.

    Raises:
        ModuleNotFoundError: playwright is not installed.
        TooLate: the machine is too busy.
    """
    from caesura_testing.browser import chromium  # noqa: PLC0415 - --help and main's words come without playwright

    demo = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "caesura_ctl", "demo", "--update-takes", "5s"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        url = await _url(demo)
        async with chromium() as browser:
            pages: dict[str, Page] = {}
            for name, scheme in (("live-page.png", "light"), ("live-page-dark.png", "dark")):
                context = await browser.new_context(
                    viewport={"width": 1280, "height": 1020},
                    color_scheme="dark" if scheme == "dark" else "light",
                    reduced_motion="reduce",
                )
                pages[name] = await context.new_page()
                await _open(pages[name], url)
            async with asyncio.timeout(_PATIENCE_S):
                for page in pages.values():
                    while not await page.evaluate(_MOMENT):  # noqa: ASYNC110 - a page tells nobody
                        await asyncio.sleep(0.05)
            await asyncio.sleep(_INTO_THE_PAUSE_S)
            taken = await asyncio.gather(*(page.screenshot() for page in pages.values()))
            if not all([await page.evaluate(_MOMENT) for page in pages.values()]):
                raise TooLate(
                    "the wave was over before the pictures were taken: try again on a machine that is less busy"
                )
            for name, picture in zip(pages, taken, strict=True):
                (out / name).write_bytes(picture)
                sys.stdout.write(f"{out / name}: {(out / name).stat().st_size} bytes\n")
    finally:
        if demo.returncode is None:
            demo.terminate()
        await demo.communicate()


async def _url(demo: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(_PATIENCE_S):
        while demo.stdout is not None and (line := (await demo.stdout.readline()).decode()):
            if line.startswith("live page: "):
                return line.split()[2]
    raise RuntimeError("the demo ended before it named its page")


async def _open(page: Page, url: str) -> None:
    async with asyncio.timeout(_PATIENCE_S):
        while True:
            try:
                await page.goto(url)
            except Exception:  # noqa: BLE001 - the exporter is starting
                await asyncio.sleep(0.2)
            else:
                return


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=_OUT, help="folder of the pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    try:
        asyncio.run(take(out))
    except ModuleNotFoundError as error:
        parser.exit(
            2, f"{error.name} is not installed: run ./check --fast once, or uv sync --locked --all-extras\n"
        )


if __name__ == "__main__":
    main()
