"""The trajectory viewer in a real browser: a token's gate, filters, two checkpoints, the keyboard, hostile texts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra `dev` has it)")

from playwright.sync_api import Browser, Page, expect  # noqa: E402

from fiberpo_megatron.telemetry.rollout_log import write_records  # noqa: E402
from fiberpo_megatron.telemetry.token_log import write_tokens  # noqa: E402
from tests.watch.browser import Watcher, browser, needs_chromium, open_page  # noqa: E402
from tests.watch.serving import served  # noqa: E402
from tests.watch.trajectory_run import text_line, token_line, write_branches, write_trajectories  # noqa: E402

pytestmark = needs_chromium
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture
def page(chromium: Browser, tmp_path: Path) -> Iterator[Page]:
    with opened(chromium, write_trajectories(tmp_path / "run")) as (found, _):
        yield found


class opened:
    """The view of a run folder; nothing may go wrong in the browser, and no request may leave the machine."""

    def __init__(self, chromium: Browser, folder: Path, view: str = "trajectories") -> None:
        self.server = served({"0": folder}, follow=False)
        self.chromium, self.view = chromium, view

    def __enter__(self) -> tuple[Page, Watcher]:
        port = self.server.__enter__()
        self.page, self.watcher = open_page(self.chromium, f"http://127.0.0.1:{port}/#{self.view}")
        return self.page, self.watcher

    def __exit__(self, kind: object, *rest: object) -> None:
        self.page.close()
        self.server.__exit__(None, None, None)
        if kind is None:
            assert self.watcher.errors == [] and self.watcher.hosts == {"127.0.0.1"}


def token(page: Page, i: int):
    return page.locator(f"#tr-tokens [data-i='{i}']")


def test_a_branch_begins_on_a_line_of_its_own(chromium: Browser, tmp_path: Path):
    with opened(chromium, write_branches(tmp_path)) as (page, _):
        expect(page.locator("#tr-tokens .tr-branch")).to_have_text("Branch 1, from its prompt on")
        assert [block.locator("[data-i]").count() for block in page.locator(".tr-block").all()] == [2, 3]


def test_hover_shows_what_stopped_a_token_and_filters_work(page: Page):
    card, rows = page.locator("#tr-card"), page.locator(".tr-list li")
    token(page, 1).hover()
    expect(card).to_contain_text("trajectory: S+ 0.31 over 0.12, zeroed")
    expect(card).to_contain_text("It became more likely: c = 0.002 = 0.2 × weight × advantage.")
    token(page, 2).hover()
    expect(card).to_contain_text("clipped: residual 0.3 over 0.05")
    expect(card).to_contain_text("It did not learn: c = 0.")
    expect(card).to_contain_text("engine 1 with weights 5, 0 behind")
    token(page, 3).hover()
    expect(card).to_contain_text("The environment wrote this token")
    token(page, 4).hover()
    expect(card).to_contain_text("No gate and no clip stopped it.")
    assert HOSTILE in token(page, 1).text_content() and page.locator("#view img").count() == 0
    expect(page.locator(".tr-legend")).to_contain_text("trajectory zeroed (1)")
    assert "tk-k" in token(page, 1).get_attribute("class")

    expect(rows).to_have_count(4)
    page.select_option("#tr-domain", "words")
    expect(rows).to_have_count(2)
    page.fill("#tr-reward-min", "0.5")
    expect(rows).to_have_count(1)
    expect(page.locator(".tr-head")).to_contain_text("words/16")


@pytest.mark.exhaustive
def test_the_keyboard_reaches_every_token(page: Page):
    page.locator("#tr-tokens").focus()
    card = page.locator("#tr-card")
    expect(card).to_contain_text("token 1 of 5")
    page.keyboard.press("ArrowRight")
    expect(card).to_contain_text("token 2 of 5")
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    expect(card).to_contain_text("token 5 of 5")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    expect(card).to_contain_text("token 1 of 5")
    page.locator(".tr-list button").nth(1).focus()
    page.keyboard.press("Enter")
    expect(page.locator(".tr-head")).to_contain_text("sums/8")
    expect(card).to_contain_text("token 1 of 4")


@pytest.mark.exhaustive
def test_every_quantity_colours_tokens(page: Page):
    page.locator("#tr-tokens").wait_for()
    names = page.locator("#tr-colour option").evaluate_all("all => all.map(one => one.value)")
    assert names == [
        "stopped", "coefficient", "ratio", "advantage", "probability", "entropy", "weight", "mismatch", "version"
    ]  # fmt: skip
    for name in names:
        page.select_option("#tr-colour", name)
        classes = page.locator("#tr-tokens .tk").evaluate_all("all => all.map(one => one.className)")
        assert any("tk-p" in one or "tk-k" in one or "tk-n" in one for one in classes) or name == "mismatch", name
    page.select_option("#tr-colour", "entropy")
    assert "tk-p7" in token(page, 2).get_attribute("class") and "tk-p" in token(page, 0).get_attribute("class")
    page.select_option("#tr-colour", "ratio")
    assert "tk-n" in token(page, 0).get_attribute("class")
    page.locator(".tr-list button").nth(2).click()  # the choice stays for the next trajectory
    expect(page.locator(".tr-head")).to_contain_text("words/16")
    expect(page.locator("#tr-colour")).to_have_value("ratio")


@pytest.mark.exhaustive
def test_steps_searches_and_addresses(page: Page):
    page.locator("#tr-tokens").wait_for()
    page.get_by_label("Earlier step").click()
    expect(page.locator("#tr-step")).to_have_value("4")
    page.select_option("#tr-step", "0")
    expect(page.locator(".tr-detail")).to_contain_text("Nothing is recorded of single tokens")
    expect(page.locator(".tr-response")).to_contain_text(HOSTILE)
    page.fill("#tr-search", "words 16")
    expect(page.locator(".tr-list li")).to_have_count(1)
    page.get_by_label("in all steps").check()
    expect(page.locator(".tr-list li")).to_have_count(3)
    expect(page.locator("[role=status]").first).to_contain_text("3 of 12 trajectories in 3 steps")
    page.reload()
    expect(page.locator(".tr-list li")).to_have_count(3)
    page.fill("#tr-search", "nothing like it")
    expect(page.locator(".tr-list")).to_contain_text("No trajectory passes the filters.")
    page.select_option("#tr-kind", "eval")
    page.fill("#tr-search", "")
    expect(page.locator(".tr-list li").first).to_contain_text("after 4: 0")


@pytest.mark.exhaustive
def test_two_checkpoints_side_by_side(page: Page):
    page.select_option("#tr-kind", "compare")
    pairs = page.locator(".tr-pair")
    expect(pairs).to_have_count(3)
    expect(pairs.first).to_contain_text("after 0: 0")
    expect(pairs.first).to_contain_text("after 4: 0")
    page.select_option("#tr-left", "0:4")
    page.check("#tr-different")
    expect(pairs).to_have_count(0)
    expect(page.locator("[role=status]").nth(1)).to_contain_text("0 of 3 prompts")


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [(390, 844), (1280, 800)])
def test_it_fits_a_phone_and_both_themes(chromium: Browser, tmp_path: Path, size: tuple[int, int]):
    with opened(chromium, write_trajectories(tmp_path / "run")) as (page, _):
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": size[0], "height": size[1]})
            page.locator("#tr-tokens").wait_for()
            page.locator("#tr-card table").first.wait_for()
            assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@pytest.mark.exhaustive
def test_a_trajectory_of_32768_tokens_stays_fluent(chromium: Browser, tmp_path: Path):
    """The browser's own time on its main thread, which other work on the machine lengthens little."""
    size = 1 << 15
    folder = write_trajectories(tmp_path / "run")
    text, tokens = text_line(5, 0), token_line(5, 0)
    fill = lambda values: [values[i % 3] for i in range(size)]  # noqa: E731
    for name, values in tokens["tokens"].items():
        tokens["tokens"][name] = [fill(row) for row in values] if isinstance(values[0], list) else fill(values)
    tokens["tokens"]["text"] = [" word" if i % 17 else "\n" for i in range(size)]
    tokens["levels"][0]["of"], text["token_ids"] = [0] * size, [7] * size
    write_records(folder, 5, [text], keep=99)
    write_tokens(folder, 5, [tokens], keep=99)
    with opened(chromium, folder) as (page, _):
        page.locator(f"#tr-tokens [data-i='{size - 1}']").wait_for(state="attached", timeout=60_000)
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})

        def busy() -> float:
            metrics = session.send("Performance.getMetrics")["metrics"]
            return next(one["value"] for one in metrics if one["name"] == "ThreadTime")

        def seconds(script: str) -> float:
            before = busy()
            page.evaluate(f"async () => {{ {script}; await new Promise(requestAnimationFrame) }}")
            return busy() - before

        recolour = (
            "const c = document.getElementById('tr-colour'); c.value = 'entropy'; c.dispatchEvent(new Event('change'))"
        )
        hover = "for (let i = 0; i < 100; i++) document.querySelector(`[data-i='${i}']`)"
        hover += ".dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))"
        scroll = "for (let i = 0; i < 50; i++) { scrollBy(0, 400); await new Promise(requestAnimationFrame) }"
        found = {name: seconds(script) for name, script in (("colour", recolour), ("hover", hover), ("scroll", scroll))}
    print(found)
    assert found["colour"] < 1.0 and found["hover"] / 100 < 0.02 and found["scroll"] / 50 < 0.05
