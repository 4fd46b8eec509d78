"""The page in a real browser: every view of a recorded run of the demo, without an error and without the network."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra `dev` has it)")

from playwright.sync_api import Browser, Page, expect  # noqa: E402

from tests.watch.browser import DRAWN, browser, needs_chromium, open_page  # noqa: E402
from tests.watch.serving import served  # noqa: E402

DEMO = Path(__file__).parent / "data/demo"
VIEWS = re.findall(
    r'^  "(\w+)"', (Path(__file__).parents[2] / "fiberpo_megatron/watch/static/views/registry.js").read_text(), re.M
)
WITH_CHARTS = {"overview", "curves", "gates", "drift", "domains", "efficiency"}

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return shutil.copytree(DEMO, tmp_path / "demo")


def open_view(page: Page, key: str) -> None:
    page.evaluate("key => { location.hash = key }", key)
    page.locator(f".view.{key}").wait_for()


def test_every_view_shows_a_real_run(chromium: Browser, run: Path):
    with served({"0": run}, follow=False) as port:
        page, watcher = open_page(chromium, f"http://127.0.0.1:{port}/")
        tabs = page.locator("#tabs a")
        expect(tabs).to_have_count(len(VIEWS))
        for key in VIEWS:
            open_view(page, key)
            expect(page.locator(f"#tabs a[href='#{key}']")).to_have_attribute("aria-current", "page")
            if key in WITH_CHARTS:
                page.locator(DRAWN).first.wait_for()
            expect(page.locator(f".view.{key} > *").first).to_be_attached()
            assert page.locator(".view [role=alert]").count() == 0
            wide = page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
            assert wide, f"{key} is wider than the window"

        # by keyboard alone: to a tab, to a chart, along its points, and out of a zoom
        page.locator("#tabs a[href='#overview']").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        page.locator(f".view.curves {DRAWN}").first.wait_for()
        plot = page.locator(".view.curves .plot").first
        plot.focus()
        page.keyboard.press("Home")
        expect(page.locator(".view.curves .legend .at").first).to_have_text("step 0")
        page.keyboard.press("ArrowRight")
        expect(page.locator(".view.curves .legend .at").first).to_have_text("step 1")
        expect(page.locator("#announcement")).to_contain_text("step 1: training prompts")
        page.keyboard.press("l")
        expect(page.locator(".view.curves .log").first).to_have_attribute("aria-pressed", "true")
        page.keyboard.press("End")
        page.keyboard.press("+")
        expect(page.locator(".range")).to_contain_text("steps 6 to 8")
        page.keyboard.press("0")
        expect(page.locator(".range")).to_contain_text("drag in a chart to zoom")

        assert watcher.errors == []
        assert watcher.hosts == {"127.0.0.1"} and watcher.methods == {"GET"}
        page.close()


@pytest.mark.exhaustive
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1366])
def test_every_view_in_both_themes_on_a_phone_and_a_laptop(chromium: Browser, run: Path, scheme: str, width: int):
    with served({"0": run}, follow=False) as port:
        options = {"color_scheme": scheme, "viewport": {"width": width, "height": 844}}
        page, watcher = open_page(chromium, f"http://127.0.0.1:{port}/", **options)
        grounds = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}
        for key in VIEWS:
            open_view(page, key)
            if key in WITH_CHARTS:
                page.locator(DRAWN).first.wait_for()
            page.wait_for_timeout(300)
            expect(page.locator("body")).to_have_css("background-color", grounds[scheme])
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 0, f"{key} is {wide} px wider than the window"
        other = {"light": "dark", "dark": "light"}[scheme]
        while page.locator("#theme").get_attribute("title") != f"Theme: {other}":
            page.locator("#theme").click()
        expect(page.locator("body")).to_have_css("background-color", grounds[other])
        page.reload()
        expect(page.locator("body")).to_have_css("background-color", grounds[other])
        assert watcher.errors == []
        page.close()


@pytest.mark.exhaustive
def test_new_points_appear_within_five_seconds(chromium: Browser, run: Path):
    with served({"0": run}) as port:
        page, watcher = open_page(chromium, f"http://127.0.0.1:{port}/#curves?filter=entropy")
        chart = page.locator(DRAWN).first
        chart.wait_for()
        points = int(chart.get_attribute("data-points") or 0)
        last = json.loads((run / "metrics.jsonl").read_bytes().rstrip().rpartition(b"\n")[2])
        delays = []
        for step in range(8, 12):
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(last | {"kind": "train", "step": step, "entropy": 0.1 * step}) + "\n")
            begin = time.monotonic()
            page.locator(f"figure.chart[data-points='{points + step - 7}']").first.wait_for(timeout=5000)
            delays.append(time.monotonic() - begin)
        print(f"new points were drawn after {max(delays):.1f} s at most")
        assert watcher.errors == []
        page.close()


@pytest.mark.exhaustive
def test_two_runs_are_overlaid_and_a_drag_asks_for_detail(chromium: Browser, run: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    with served({"0": run, "1": other}, follow=False) as port:
        page, watcher = open_page(chromium, f"http://127.0.0.1:{port}/#curves?filter=entropy")
        page.locator(DRAWN).first.wait_for()
        legend = page.locator("figure.chart").first.locator(".legend")
        expect(legend).to_contain_text("demo")
        expect(legend).to_contain_text("other")
        box = page.locator("figure.chart .u-over").first.bounding_box()
        assert box is not None
        with page.expect_request(lambda request: "from=" in request.url and "to=" in request.url):
            page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 40)
            page.mouse.down()
            page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 40, steps=5)
            page.mouse.up()
        expect(page.locator(".range")).to_contain_text("steps 2 to 6")
        page.locator("figure.chart .u-over").first.dblclick()
        expect(page.locator(".range")).to_contain_text("drag in a chart")
        page.locator("#run-1").click()
        expect(page.locator("#run-1")).to_have_attribute("aria-pressed", "false")
        expect(page.locator("figure.chart").first.locator(".legend")).not_to_contain_text("other")
        assert "show=0" in page.url
        assert watcher.errors == []
        page.close()


@pytest.mark.exhaustive
def test_no_text_of_a_run_becomes_html(chromium: Browser, run: Path, tmp_path: Path):
    evil = "<img src=x onerror=document.title='owned'>"
    folder = tmp_path / evil
    run.rename(folder)
    last = json.loads((folder / "metrics.jsonl").read_bytes().rstrip().rpartition(b"\n")[2])
    record = last | {"kind": "train", "step": 8, evil: 1.0, f"environment/{evil}/mean": 2.0}
    alarm = {"step": 1, "kind": "train", "rule": evil, "state": "raised", "metric": evil, "value": 1.0, "limit": 0.5}
    alarm |= {"since": 1, "message": evil, "causes": [evil], "setting": evil, "severity": "warning"}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    (folder / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    (folder / "config.toml").write_text(f'[run]\nname = "{evil}"\n')
    with served({"0": folder}, follow=False) as port:
        page, watcher = open_page(chromium, f"http://127.0.0.1:{port}/")
        for key in VIEWS:
            open_view(page, key)
            page.wait_for_timeout(300)
            assert page.locator("img").count() == 0
            assert page.title() != "owned"
        open_view(page, "alarms")
        expect(page.locator(".alarm")).to_contain_text(evil)
        open_view(page, "curves")
        expect(page.locator("figcaption", has_text=evil).first).to_be_attached()
        assert watcher.errors == []
        page.close()


@pytest.mark.exhaustive
def test_a_hundred_thousand_steps_stay_fluent(chromium: Browser, run: Path, tmp_path: Path):
    """The limit is ten times what was measured (docs/watch.md), because other tests run beside this one."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[2])
    names = [name for name in last if name not in ("step", "kind")][:30]
    folder = tmp_path / "long"
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(100_000):
            values = {name: last[name] * (1 + 0.1 * (step * 7919 % 101)) for name in names}
            file.write(json.dumps({"step": step, "kind": "train"} | values) + "\n")
    with served({"0": folder}, follow=False) as port:
        begin = time.monotonic()
        page, watcher = open_page(chromium, f"http://127.0.0.1:{port}/#curves")
        page.locator(DRAWN).first.wait_for()
        opened = time.monotonic() - begin
        points = [int(chart.get_attribute("data-points") or 0) for chart in page.locator(DRAWN).all()]
        assert max(points) < 10_000, "the server sends no more points than a chart can show"
        print(f"100,000 steps: the first chart after {opened:.1f} s, {max(points)} points")
        assert opened < 20
        assert watcher.errors == []
        page.close()
