"""Debian's chromium, headless, which tells what it asked for and what it complained about."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (tools/install_chromium.sh installs it)"
)
DRAWN = "figure.chart[data-points]:not([data-points='0'])"
"""Charts that show points."""


@dataclass
class Watcher:
    """Notes what a page asks for, and its errors."""

    hosts: set[str] = field(default_factory=set)
    methods: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)

    def follow(self, page: Page) -> None:
        page.on("request", self._request)
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("requestfailed", self._failed)
        page.on("response", lambda answer: self.errors.append(answer.url) if answer.status >= 400 else None)

    def _request(self, request) -> None:
        self.hosts.add(urlsplit(request.url).hostname or request.url)
        self.methods.add(request.method)

    def _failed(self, request) -> None:
        if "ERR_ABORTED" not in (request.failure or ""):  # the page itself ends requests when a view is left
            self.errors.append(f"{request.url}: {request.failure}")


@contextmanager
def browser() -> Iterator[Browser]:
    """Give a browser that reaches this machine alone: names lead nowhere."""
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        try:
            yield found
        finally:
            found.close()


def open_page(found: Browser, address: str, **options) -> tuple[Page, Watcher]:
    """Open an address in a window of its own."""
    page = found.new_page(**({"viewport": {"width": 1280, "height": 800}} | options))
    watcher = Watcher()
    watcher.follow(page)
    page.goto(address)
    return page, watcher
