#!/usr/bin/env python3
"""Write the screenshots of docs/watch.md: the live page on the recorded run of tests/watch/data/demo, in chromium.

`python tools/watch_screenshots.py` writes docs/watch/NAME.png; `--run FOLDER` shows another run (may be repeated). The
pictures have 255 colours, so that they are small.
"""

import argparse
import io
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import uvicorn
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fiberpo_megatron.watch.app import application  # noqa: E402
from fiberpo_megatron.watch.server import keys_of, open_port  # noqa: E402

OUT = ROOT / "docs/watch"
LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 780}
SHOTS = (
    # name, view, colour scheme, window, what is clicked or pointed at first
    ("overview", "overview", "light", LAPTOP, None),
    ("step", "step", "light", LAPTOP, None),
    ("gates-dark", "gates", "dark", LAPTOP, None),
    ("trajectories", "trajectories", "light", LAPTOP, ".view.trajectories [data-i]"),
    ("alarms", "alarms", "light", LAPTOP, None),
    ("phone-dark", "overview", "dark", PHONE, None),
)
COLOURS = 255


def serve(folders: list[Path]) -> tuple[uvicorn.Server, threading.Thread, socket.socket]:
    """Serve run folders in a thread."""
    opened = open_port("127.0.0.1", 0)
    config = uvicorn.Config(application(keys_of(folders), follow=False), ws="none", log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run(sockets=[opened]), daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        if time.monotonic() > deadline:
            raise TimeoutError("the server of the page did not start within 30 s")
        time.sleep(0.05)
    return server, thread, opened


def shoot(browser: Browser, address: str, name: str, view: str, scheme: str, window: dict, target: str | None) -> int:
    """Write one picture and return its bytes."""
    page = browser.new_page(viewport=window, color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(f"{address}#{view}")
    page.locator(f".view.{view}").wait_for()
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(1000)
    if target is not None and page.locator(target).count():
        page.locator(target).nth(2).hover()  # a token that its own clip has stopped
        page.wait_for_timeout(500)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    page.close()
    path = OUT / f"{name}.png"
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    return path.stat().st_size


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, action="append", metavar="FOLDER", help="a run to show")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    options.run = [run.resolve() for run in options.run or ()]
    OUT.mkdir(exist_ok=True)
    runs = tempfile.TemporaryDirectory()
    os.chdir(runs.name)  # the page shows the path of a run as it was given
    shutil.copytree(ROOT / "tests/watch/data/demo", Path("runs/demo"))
    server, thread, opened = serve(options.run or [Path("runs/demo")])
    address = f"http://127.0.0.1:{opened.getsockname()[1]}/"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        total = 0
        for name, view, scheme, window, target in SHOTS:
            size = shoot(browser, address, name, view, scheme, window, target)
            total += size
            print(f"docs/watch/{name}.png: {size // 1000} kB")
        browser.close()
    print(f"together {total // 1000} kB")
    server.should_exit = True
    thread.join(10)
    os.chdir(ROOT)
    runs.cleanup()


if __name__ == "__main__":
    main()
