"""A headless browser, driven by Selenium: for the test of the page, and its picture in the docs."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",  # A container may have little shared memory.
    "--window-size=1280,1400",
)


def find_browser() -> tuple[str, str]:
    """Return the paths of a browser and its driver.

    Raises:
        FileNotFoundError: If there is none.
    """
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        raise FileNotFoundError(
            "no Chromium or Chrome with chromedriver: sudo apt-get install chromium chromium-driver"
        )
    return browser, driver


@contextmanager
def open_browser(profile: Path) -> Iterator[webdriver.Chrome]:
    """Start a browser, and close it at the end.

    Args:
        profile: Folder for its files, which must be empty or not exist.

    Raises:
        FileNotFoundError: If there is no browser.
    """
    browser, driver = find_browser()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # which Chromium refuses to use as root
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    window = webdriver.Chrome(options, Service(driver))
    try:
        yield window
    finally:
        window.quit()


def requested_hosts(window: webdriver.Chrome) -> set[str]:
    """Return host and port of every request since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in window.get_log("performance")]
    urls = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    inside = ("blob", "chrome", "data")
    return {urlsplit(url).netloc for url in urls if urlsplit(url).scheme not in inside}
