"""A headless Chromium for tests of pages."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

WAIT_SECONDS = 120.0
WIDE = (1280, 860)
BINARIES = ("chromium", "chromedriver")


@contextmanager
def chromium(size: tuple[int, int] = WIDE, *, dark: bool = False) -> Iterator[Chrome]:
    """A browser of its own, ended afterwards; the test is skipped where there is none."""
    paths = {name: shutil.which(name) for name in BINARIES}
    if missing := [name for name, path in paths.items() if path is None]:
        pytest.skip(f"{' and '.join(missing)} not found: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = str(paths["chromium"])
    flags = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    flags += ["--disable-background-networking", f"--window-size={size[0]},{size[1]}"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")  # Chromium's own sandbox does not run as root
    if dark:
        flags.append("--blink-settings=preferredColorScheme=0")
    for flag in flags:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, Service(str(paths["chromedriver"])))
    try:
        driver.set_window_size(*size)
        yield driver
    finally:
        driver.quit()


def until(driver: Chrome, condition: Callable[[], Any], what: str) -> Any:
    """Wait until a condition is true; returns its value."""
    waiting = WebDriverWait(driver, WAIT_SECONDS, poll_frequency=0.05)
    return waiting.until(lambda _: condition(), f"it never happened that {what}")
