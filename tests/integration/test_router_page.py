"""The status page in a real browser: it shows what is there, loads nothing from elsewhere, and asks for its key."""

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes.openai_replica import FakeReplica, Fault
from routers import Running, fakes, replica_of, router, run

from flagscale.serve.router import history
from flagscale.serve.router.page import load_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt-get install chromium)")


def test_the_page_is_self_contained() -> None:
    html, policy = load_page()
    assert not re.findall(rb"""(?:src|href)=["'](?!data:)|https?://(?!www\.w3\.org/2000/svg)|@import|url\(""", html)
    assert not re.findall(rb"innerHTML|document\.write|eval\(|\son\w+=|\sstyle=", html)
    assert "default-src 'none'" in policy
    assert policy.count("'sha256-") == 2
    assert len(html) < 32 * 1024


@asynccontextmanager
async def page(scheme: str = "light") -> AsyncIterator[tuple[Any, list[str]]]:
    """A browser's page, and whatever went wrong in it or was asked of another host."""
    from playwright.async_api import async_playwright

    faults: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            it = await browser.new_page(color_scheme=scheme, viewport={"width": 1160, "height": 900})
            it.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
            it.on("pageerror", lambda error: faults.append(str(error)))
            it.on("request", lambda asked: None if "//127.0.0.1:" in asked.url else faults.append(asked.url))
            yield it, faults
        finally:
            await browser.close()


async def make_traffic(it: Running, count: int) -> None:
    await asyncio.gather(*(it.ask(stream=True, max_tokens=4) for _ in range(count)))


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_replicas_load_and_latency(scheme: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(history, "EVERY_S", 0.05)

    async def work() -> None:
        async with (
            fakes(2, token_s=0.01, first_token_s=0.02) as made,
            FakeReplica(name="big0", model="org/big") as big,
            FakeReplica(name="gone", model="org/big") as gone,
            router(*made, big, gone) as it,
            page(scheme) as (shown, faults),
        ):
            await make_traffic(it, 8)
            await gone.stop()
            big.faults.append(Fault("disconnect"))
            await asyncio.gather(*(it.ask(model="org/big") for _ in range(4)))
            it.pool.add(replica_of(FakeReplica(name="new", port=1), version="2"))
            for _ in range(10):
                await make_traffic(it, 3)
            await shown.goto(it.url)
            await shown.get_by_text("replicas ready").wait_for()
            cards = {
                await card.locator("strong").inner_text(): await card.inner_text()
                for card in await shown.locator("article").all()
            }
            assert set(cards) == {"r0", "r1", "big0", "gone", "new"}
            assert "ready" in cards["r0"]
            assert "starting" in cards["new"]
            assert "version 2" in cards["new"]
            assert await shown.locator("h2").all_inner_texts() != []
            curves = [await it.get_attribute("d") for it in await shown.locator("svg path.line").all()]
            assert any("L" in curve for curve in curves)
            background = await shown.evaluate("getComputedStyle(document.body).backgroundColor")
            assert background == {"light": "rgb(246, 247, 249)", "dark": "rgb(16, 19, 26)"}[scheme]
            await shown.screenshot(path=tmp_path / f"page-{scheme}.png", full_page=True)
            before = await shown.locator("#totals").inner_text()
            await make_traffic(it, 5)
            await until_changed(shown, before)
            assert faults == []

    run(work())


async def until_changed(shown: Any, before: str) -> None:
    """The page renews itself."""
    async with asyncio.timeout(20):
        while await shown.locator("#totals").inner_text() == before:
            await asyncio.sleep(0.1)


@needs_browser
def test_the_page_asks_for_the_key_and_tells_when_nobody_answers() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), page() as (shown, faults):
            async with router(fake, api_keys=["secret"]) as it:
                await shown.goto(it.url)
                await shown.get_by_text("This router wants an API key").wait_for()
                assert "r0" not in await shown.inner_text("main")
                await shown.fill("#key", "wrong")
                await shown.click("button")
                await shown.get_by_text("This is not a valid key").wait_for()
                await shown.fill("#key", "secret")
                await shown.click("button")
                await shown.get_by_text("replicas ready").wait_for()
                assert await shown.locator("#ask").is_hidden()
                await shown.reload()
                await shown.get_by_text("replicas ready").wait_for()
                assert "secret" not in shown.url
            await shown.get_by_text("The router has not answered").wait_for()
            unexpected = [fault for fault in faults if "401" not in fault and "ERR_CONNECTION" not in fault]
            assert unexpected == []

    run(work())
