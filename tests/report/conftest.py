"""One browser for all tests of pages, without a network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--hide-scrollbars",
)  # fmt: skip


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chrome]:
    """Headless Chromium, where it is installed."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = browser
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = Chrome(options, ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture
def browser(chromium: Chrome) -> Iterator[Chrome]:
    """The browser, wide and light; afterwards its console has said nothing."""
    look(chromium)
    yield chromium
    assert chromium.get_log("browser") == []  # type: ignore[no-untyped-call]
    chromium.get("about:blank")  # a page's videos would play on beside the tests that follow


def look(browser: Chrome, width: int = 1200, scheme: str = "light") -> None:
    """How wide the window is, in pixels, and whether it is light or dark."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
