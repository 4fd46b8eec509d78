#!/usr/bin/env python3
"""Measure `fiberpo watch` on a run of many steps: reading, memory, the first chart, a zoom, and a new record.

`python tools/bench_watch.py --steps 100000 --like RUN_FOLDER` writes a run folder with the metrics of a real one,
its values with noise, serves it, and drives a real browser (chromium, by playwright). It prints one figure a line.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import Page, sync_playwright

DEADLINE_S = 120.0
FIRST_CHART = "document.querySelectorAll('figure.chart[data-points]:not([data-points=\"0\"])').length"


def write_long_run(folder: Path, like: Path, steps: int) -> int:
    """Write a run of `steps` steps with the metrics of another one, and return the bytes of its metrics.jsonl."""
    records = [json.loads(line) for line in (like / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"][-1]
    held_out = next((record for record in records if record["kind"] == "eval"), None)
    generator = random.Random(7)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            file.write(json.dumps(_noisy(train, step, generator)) + "\n")
            if held_out is not None and step % 500 == 0:
                file.write(json.dumps(_noisy(held_out, step, generator)) + "\n")
    return (folder / "metrics.jsonl").stat().st_size


def _noisy(record: dict[str, Any], step: int, generator: random.Random) -> dict[str, Any]:
    noise = {
        name: value * (0.5 + generator.random()) if isinstance(value, float) else value
        for name, value in record.items()
    }
    return noise | {"step": step}


@contextmanager
def watched(folder: Path) -> Iterator[tuple[str, psutil.Process, float]]:
    """Run `fiberpo watch` on a folder, and give its address, its process, and the seconds until it printed that."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "fiberpo_megatron.cli.main", "watch", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        yield lines[1].strip(), psutil.Process(process.pid), time.monotonic() - begin
    finally:
        process.terminate()
        process.wait(30)


def ask(address: str, path: str) -> Any:
    """Return the JSON at a path of the server."""
    with urllib.request.urlopen(address + path, timeout=60) as answer:
        return json.load(answer)


def wait_until(page: Page, condition: str, begin: float) -> float:
    """Return the seconds from `begin` until a condition of JavaScript holds in a page."""
    while not page.evaluate(condition):  # wait_for_function would need eval, which the page's policy forbids
        if time.monotonic() - begin > DEADLINE_S:
            raise TimeoutError(f"the page did not fulfil {condition} within {DEADLINE_S:.0f} s")
        time.sleep(0.01)
    return time.monotonic() - begin


def main() -> None:
    """Measure a long run and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument(
        "--like", type=Path, required=True, metavar="RUN_FOLDER", help="a run with the metrics to write"
    )
    parser.add_argument("--chromium", default="chromium")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_long_run(folder, options.like, options.steps)
        print(f"metrics.jsonl: {options.steps} steps, {size / 2**20:.0f} MiB")
        with watched(folder) as (address, process, started_s):
            print(f"start of the server: {started_s:.1f} s")
            measure(address, process, folder, options.chromium)


def measure(address: str, process: psutil.Process, folder: Path, chromium: str) -> None:
    """Measure one server with a browser."""
    begin = time.monotonic()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1366, "height": 900})
        page.goto(f"{address}#curves")
        first = wait_until(page, f"{FIRST_CHART} > 0", time.monotonic())
        print(f"first chart, while the file is still being read: {first:.2f} s after the page was opened")
        while ask(address, "api/runs")[0]["read"] < 1:
            time.sleep(0.2)
        print(f"whole file read: {time.monotonic() - begin:.1f} s after the start of the server")
        time.sleep(6)
        print(f"memory of the server: {process.memory_info().rss / 2**20:.0f} MiB")
        page.close()

        page = browser.new_page(viewport={"width": 1366, "height": 900})
        begin = time.monotonic()
        page.goto(f"{address}#curves")
        print(f"page opened, first chart: {wait_until(page, f'{FIRST_CHART} > 0', begin):.2f} s")
        print(f"page opened, first six charts: {wait_until(page, f'{FIRST_CHART} > 5', begin):.2f} s")
        _zoom(page)
        _append(page, process, folder)
        browser.close()


def _zoom(page: Page) -> None:
    """Drag over a quarter of a chart, and wait for the points of that range."""
    over = page.locator("figure.chart .u-over").first
    box = over.bounding_box()
    assert box is not None
    before = page.evaluate("performance.getEntriesByType('resource').length")
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50, steps=4)
    begin = time.monotonic()
    page.mouse.up()
    took = wait_until(page, f"performance.getEntriesByType('resource').length > {before} + 2", begin)
    print(f"zoom into a quarter of the steps, first charts redrawn: {took:.2f} s")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="show all steps").click()
    page.wait_for_timeout(1500)


def _append(page: Page, process: psutil.Process, folder: Path) -> None:
    """Append records, and measure when they are seen and what they cost the server."""
    path = folder / "metrics.jsonl"
    last = json.loads(path.read_bytes().rstrip().rpartition(b"\n")[2])
    delays, costs = [], []
    for _ in range(5):
        last["step"] += 1
        page.wait_for_timeout(2500)
        before = sum(process.cpu_times()[:2])
        with path.open("a") as file:
            file.write(json.dumps(last) + "\n")
        begin = time.monotonic()
        seen = f"fetch('api/runs').then((a) => a.json()).then((r) => r[0].kinds.train.last === {last['step'] + 1})"
        delays.append(wait_until(page, f"() => {seen}", begin))
        page.wait_for_timeout(2500)
        costs.append(sum(process.cpu_times()[:2]) - before)
    print(f"a new record, seen by the server: {max(delays):.1f} s at most; the page asks every 2 s")
    print(f"an update of the open page: {1000 * sorted(costs)[2]:.0f} ms of the server's CPU time, median of 5")


if __name__ == "__main__":
    main()
