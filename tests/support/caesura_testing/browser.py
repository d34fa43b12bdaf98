"""A real Chromium for tests and pictures, driven by playwright; and what is asked of a page in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from playwright.async_api import Browser, Page, async_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)

# Text against what is behind it, by WCAG 2.2 (relative luminance, contrast ratio, success criterion 1.4.3).
_CONTRAST = """
() => {
  const parse = (text) => {
    const found = text.match(/[\\d.]+/g);
    return found ? found.map(Number) : [0, 0, 0, 0];
  };
  const over = (top, below) => {
    const alpha = top[3] === undefined ? 1 : top[3];
    return [0, 1, 2].map((index) => top[index] * alpha + below[index] * (1 - alpha));
  };
  const light = (color) => {
    const [r, g, b] = color.map((each) => each / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, two) => {
    const [a, b] = [light(one), light(two)].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  const behind = (node) => {
    const layers = [];
    for (let each = node; each; each = each.parentElement) layers.push(parse(getComputedStyle(each).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const clipped = (node) => {
    for (let each = node; each; each = each.parentElement) if (getComputedStyle(each).clipPath !== "none") return true;
    return false;
  };
  const poor = [];
  let looked = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !node.checkVisibility()) continue;
    const style = getComputedStyle(node);
    if (clipped(node) || node.closest(".skip, script, style, noscript, option")) continue;
    const back = behind(node);
    const svg = node instanceof SVGElement;
    const ink = over(parse(svg ? style.fill : style.color), back);
    const px = parseFloat(style.fontSize);
    const large = px >= 24 || (px >= 18.66 && Number(style.fontWeight) >= 700);
    const found = ratio(ink, back);
    looked += 1;
    if (found < (large ? 3 : 4.5)) poor.push(`${found.toFixed(2)} ${node.tagName}.${node.getAttribute("class")}: ${walker.currentNode.textContent.trim()}`);
  }
  return { looked, poor };
}
"""


def find_chromium() -> str | None:
    """The installed Chromium or Chrome, None if there is none."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A headless browser while the block runs.

    Raises:
        RuntimeError: none is installed.
    """
    path = find_chromium()
    if path is None:
        raise RuntimeError("no Chromium is installed (on Debian: apt-get install chromium)")
    # Chromium's own sandbox does not run as root.
    flags = [*_FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=flags)
        try:
            yield browser
        finally:
            await browser.close()


async def poor_contrast(page: Page) -> tuple[int, list[str]]:
    """How many pieces of text were looked at, and those that are hard to read: below 4.5, or 3 where they are large."""
    found: dict[str, Any] = await page.evaluate(_CONTRAST)
    return found["looked"], found["poor"]


async def accessibility_tree(page: Page) -> list[tuple[str, str]]:
    """(role, name) of everything that assistive technology is notified of, in order."""
    session = await page.context.new_cdp_session(page)
    tree = await session.send("Accessibility.getFullAXTree")
    await session.detach()
    return [
        (str(node["role"]["value"]), str(node.get("name", {}).get("value", "")))
        for node in tree["nodes"]
        if not node.get("ignored")
    ]
