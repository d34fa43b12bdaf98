"""The live page in a real browser follows a real rollout over really frozen processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from caesura.bus.local_broker import free_port
from caesura_testing.browser import accessibility_tree, poor_contrast
from caesura_testing.sandbox import Vm

_NAMED = {
    "link",
    "button",
    "radio",
    "combobox",
    "img",
    "image",
    "table",
    "region",
    "heading",
    "group",
    "list",
}


async def _fleet(stages: Callable[..., Any]) -> tuple[Any, str]:
    """Two hosts, two VMs each, one set, two domains, and an exporter; its page's URL."""
    stage = await stages(
        up=False,
        host_1=[Vm(name=f"web-{number}", set="web", update_domain=0) for number in (1, 2)],
        host_2=[Vm(name=f"web-{number}", set="web", update_domain=1) for number in (3, 4)],
    )
    listen = f"127.0.0.1:{free_port()}"
    stage.sandbox.service("exporter", "caesura_metrics_exporter", {"LISTEN": listen, "HEALTH_LISTEN": ""})
    await stage.sandbox.start("exporter")
    await stage.up("host-1", "host-2")
    return stage, f"http://{listen}/"


async def test_it_follows_a_rollout_to_its_end_and_over_a_restart(
    stages: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    stage, url = await _fleet(stages)
    wide = await visit(url)
    narrow = await visit(url, width=360, height=780, color_scheme="dark", is_mobile=True)
    await wide.until("document.querySelectorAll('.lane').length === 2")
    await wide.until("document.getElementById('link-text').textContent === 'live'")
    rollout = await stage.roll()

    # In the middle: what stands still by the kernel is what the page says.
    await stage.frozen("web-1", "web-2")
    await wide.until("document.querySelectorAll('.standing li').length === 2")
    assert "2 VMs" in await wide.text("#standing-count")
    assert (await wide.text("#rollout-title")).startswith("patch")
    assert "Wave 1 is under way: 2 VMs are paused" in await wide.text(".line")
    assert await wide.states("web/ud/0") == ["scheduled", "started", "frozen"]
    await wide.until("document.getElementById('say').textContent.includes('frozen: web domain 0')")
    assert "waits for wave 2" in await wide.text(".lane:nth-child(2) .now")

    state = await stage.ended(rollout)
    assert state.status == "completed", state.reason
    await wide.until("document.querySelector('.chip.completed') !== null")
    for lane in ("web/ud/0", "web/ud/1"):
        assert await wide.states(lane) == ["scheduled", "started", "frozen", "resumed", "verified"]
    assert await wide.text("#standing-body") == "No VM is paused."
    assert await wide.page.is_hidden("#alarms")

    # The seconds are those that the hosts measured.
    pauses = [each.pause_s for each in stage.fleet_view.pauses.values() if each.update_domain == 0]
    assert len(pauses) == 2
    cells = await wide.page.locator(".pauses tbody tr").first.locator("td").all_inner_texts()
    shown = [float(cell.split()[-2]) for cell in cells if cell.endswith(" s")]
    assert shown[0] == round(min(pauses), 2)
    assert shown[2] == round(max(pauses), 2)
    assert "8 s" in cells, "the budget"
    rows = await wide.page.locator(".log tbody tr").all_inner_texts()
    assert sum("resumed" in row and "web-" in row for row in rows) == 4
    assert await wide.page.locator(".dots circle.mark").count() == 4

    for page in (wide, narrow):
        looked, poor = await poor_contrast(page.page)
        assert looked > 60
        assert poor == []
        assert await page.page.evaluate(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
        assert page.errors == []
        assert page.elsewhere == []

    # A new exporter remembers nothing, and the page goes on with it by itself.
    await stage.sandbox.kill("exporter")
    await wide.until("document.getElementById('link-text').textContent.includes('not reached')")
    await stage.sandbox.start("exporter")
    await wide.until("document.getElementById('link-text').textContent === 'live'")
    await wide.until(
        "document.querySelectorAll('.lane').length === 2 && !document.querySelector('.chart g.seg')"
    )
    assert "completed" in await wide.text("#rollout-title"), "what is retained is back"


async def test_keyboard_and_screen_reader(stages: Callable[..., Any], visit: Callable[..., Any]) -> None:
    stage, url = await _fleet(stages)
    await stage.ended(await stage.roll())
    visited = await visit(url)
    page = visited.page
    await visited.until("document.querySelectorAll('g.seg[data-state=verified]').length === 2")

    tree = await accessibility_tree(page)
    roles = {role for role, _ in tree}
    assert {"banner", "main", "contentinfo", "heading", "table", "rowheader", "status"} <= roles
    assert [
        (role, name) for role, name in tree if role in _NAMED and not name and role not in {"list", "group"}
    ] == []
    names = [name for role, name in tree if role in {"img", "image"}]
    assert any(name.startswith("web, domain 0: frozen") and "longest" in name for name in names)
    assert ("region", "Update domains over time") in tree

    async def focused() -> str:
        found: str = await page.evaluate(
            "document.activeElement.dataset.state || document.activeElement.id || document.activeElement.className"
        )
        return found

    await page.keyboard.press("Tab")
    assert await focused() == "skip"
    await page.keyboard.press("Enter")
    assert await focused() == "lanes"
    assert await page.evaluate("document.querySelectorAll('g.seg[tabindex=\"0\"]').length") == 1
    order = []
    for _ in range(4):
        await page.keyboard.press("Tab")
        order.append(await focused())
    assert "verified" in order, order
    while await focused() != "verified":
        await page.keyboard.press("Shift+Tab")
    await page.keyboard.press("ArrowLeft")
    await page.keyboard.press("ArrowLeft")
    assert await focused() == "frozen"
    assert "frozen" in await visited.text("#tip")
    assert "longest" in await visited.text("#tip")
    lane = await page.evaluate("document.activeElement.dataset.id")
    await page.keyboard.press("ArrowUp")
    assert await page.evaluate("document.activeElement.dataset.id") != lane
    await page.keyboard.press("Home")
    assert await focused() == "scheduled"
    await page.keyboard.press("Escape")
    assert await page.is_hidden("#tip")

    # The chart's other shape.
    await page.click("#as-table summary")
    rows = await page.locator(".segments tbody tr").all_inner_texts()
    assert sum("frozen" in row for row in rows) == 2
    assert visited.errors == []
