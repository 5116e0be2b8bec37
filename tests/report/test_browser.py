"""The pages in a real browser: they play, they sort, they fit, they can be read."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from time import sleep
from typing import Any

import pytest
import torch
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.report.conftest import look
from tests.report.making import make_run
from tests.video.making import beeps, make_video, noise
from tokenflow.propagation import Correspondence, Window
from tokenflow.report import page as report_page
from tokenflow.report import read_run, write_comparison, write_report
from tokenflow.runs.observed import Observed

PROMPT = "<script>alert(1)</script>" + "a_very_long_word_" * 12
TIMES = "return [...document.querySelectorAll('video')].map(v => v.currentTime)"
WIDTH = "return [document.documentElement.scrollWidth, innerWidth]"
HOLD_FETCH = """
{
  const [read, held] = [fetch, []];
  window.fetch = (url) => new Promise((done) => held.push(() => done(read(url))));
  window.release = () => held.forEach((one) => one());
}
"""
READ = """
return [...document.querySelectorAll("video")]
  .every(v => v.src.startsWith("blob:") && v.readyState >= 2 && !v.seeking);
"""
SEEK = """
const seek = document.querySelector("[data-seek]");
seek.value = arguments[0];
seek.dispatchEvent(new Event("input"));
"""
PRESS = """
const [place, key, ...held] = arguments;
const options = { key, bubbles: true, cancelable: true };
for (const name of held) options[name] = true;
return document.querySelector(place).dispatchEvent(new KeyboardEvent("keydown", options));
"""
WATCH = f"""
window.looks = [];
setInterval(() => looks.push((() => {{ {TIMES} }})()), 10);
"""
MEASURED = '{"metrics": {"warp_error": %s}, "round_trip": {"warp_error": 0.01}}'
CONTRAST = """
const light = (rgb) => {
  const [r, g, b] = rgb.match(/[\\d.]+/g).slice(0, 3)
    .map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const page = light(getComputedStyle(document.documentElement).backgroundColor);
return [...document.querySelectorAll("h1, h2, p, dt, dd, figcaption, td, th, output, footer")]
  .map(element => light(getComputedStyle(element).color))
  .map(text => (Math.max(text, page) + 0.05) / (Math.min(text, page) + 0.05));
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run's page."""
    window = Window(
        (0, 1), (0, 4), torch.tensor([[0, 0], [0, 1]]), torch.tensor([[1.0, 0], [0.7, 0.3]]), 6, 8
    )
    found = Correspondence(torch.zeros(2, 48, 1, dtype=torch.long), torch.ones(2, 48, 1))
    tokens = torch.rand(2, 6, 8, 4, generator=torch.Generator().manual_seed(0))
    seen = Observed("a_site." * 12, 2, 4, [0, 4], tokens, [(window, found)])
    folder = make_run(tmp_path_factory.mktemp("one") / "bar", PROMPT, seen=seen)
    assert (folder / "features.json").exists()
    (folder / "metrics.json").write_text(MEASURED % 0.02)
    write_report(read_run(folder))
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of three runs, of which the last has no metrics."""
    where = tmp_path_factory.mktemp("many")
    folders = [make_run(where / f"run{n}", steps=n, backbone=PROMPT + str(n)) for n in (9, 10, 11)]
    for folder, error in zip(folders, (0.3, 0.04), strict=False):
        (folder / "metrics.json").write_text(MEASURED % error)
    return write_comparison([read_run(f) for f in folders], where / "page.html").as_uri()


@pytest.fixture(scope="module")
def lengths(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of two runs, of 3 and of 1.5 seconds."""
    where = tmp_path_factory.mktemp("lengths")
    runs = [read_run(make_run(where / f"run{n}", frames=n)) for n in (24, 12)]
    return write_comparison(runs, where / "page.html").as_uri()


def until(browser: Chrome, condition: Any) -> Any:
    return WebDriverWait(browser, 20, poll_frequency=0.05).until(lambda _: condition())


def times(browser: Chrome) -> list[float]:
    return [float(time) for time in browser.execute_script(TIMES)]


def apart(browser: Chrome) -> float:
    """Seconds between the videos, in the middle of nine looks: a busy machine delays some."""
    looks = []
    for _ in range(9):
        looks.append(times(browser))
        sleep(0.1)
    return median(max(look) - min(look) for look in looks)


def frame(browser: Chrome) -> int:
    return int(browser.find_element(By.CSS_SELECTOR, "[data-clock]").text.split()[1])


def test_the_videos_play_in_sync(browser: Chrome, page: str) -> None:
    browser.get(page)
    assert browser.find_element(By.TAG_NAME, "h1").text == PROMPT
    until(browser, lambda: min(times(browser)) > 0.5)
    assert apart(browser) < 0.125  # a frame
    assert browser.find_element(By.CSS_SELECTOR, "[data-clock]").text.startswith("frame ")


def test_the_videos_start_again_at_their_end(browser: Chrome, page: str) -> None:
    browser.get(page)
    until(browser, lambda: min(times(browser)) > 0)
    seek = "document.querySelectorAll('video').forEach(v => { v.currentTime = 2.9 })"
    browser.execute_script(seek)
    until(browser, lambda: min(times(browser)) > 2.5)
    until(browser, lambda: 0 < max(times(browser)) < 1)


def test_a_frame_can_be_chosen(browser: Chrome, page: str) -> None:
    browser.get(page)
    until(browser, lambda: min(times(browser)) > 0)
    button = browser.find_element(By.CSS_SELECTOR, "[data-play]")
    button.click()
    assert button.accessible_name == "play"
    clock = browser.find_element(By.CSS_SELECTOR, "[data-clock]")
    plot = browser.find_element(By.CSS_SELECTOR, ".axes")
    plot.click()  # in its middle
    until(browser, lambda: clock.text == "frame 12 · 1.50 s")
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_RIGHT)
    until(browser, lambda: clock.text == "frame 13 · 1.63 s")
    assert times(browser) == pytest.approx([13 / 8, 13 / 8], abs=0.01)
    shown = [o.text for o in browser.find_elements(By.CSS_SELECTOR, ".legend output")]
    assert len(shown) == 3
    assert all(float(text) > 0 for text in shown)


def test_arrow_keys_go_by_a_frame_after_a_click_on_a_button(browser: Chrome, page: str) -> None:
    browser.get(page)
    until(browser, lambda: min(times(browser)) > 0)
    button = browser.find_element(By.CSS_SELECTOR, "[data-play]")
    clock = browser.find_element(By.CSS_SELECTOR, "[data-clock]")
    browser.find_element(By.CSS_SELECTOR, ".axes").click()
    until(browser, lambda: clock.text == "frame 12 · 1.50 s")
    button.click()
    button.click()
    source, edit = times(browser)
    assert source == edit
    before = frame(browser)
    assert before == int(source * 8) >= 12
    button.send_keys(Keys.ARROW_LEFT)
    until(browser, lambda: frame(browser) == before - 1)
    button.send_keys(Keys.SPACE)  # its own key, once
    assert button.accessible_name == "pause"


def test_a_frame_stays_chosen_when_the_videos_are_read_late(browser: Chrome, page: str) -> None:
    held = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": HOLD_FETCH})
    try:
        browser.get(page)
        browser.find_element(By.CSS_SELECTOR, ".axes").click()
        browser.execute_script("release()")
        until(browser, lambda: browser.execute_script(READ))
        assert browser.find_element(By.CSS_SELECTOR, "[data-clock]").text == "frame 12 · 1.50 s"
        assert times(browser) == pytest.approx([12 / 8, 12 / 8], abs=0.01)
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", held)


def test_the_slider_seeks_without_the_focus(browser: Chrome, page: str) -> None:
    browser.get(page)
    until(browser, lambda: min(times(browser)) > 0 and browser.execute_script(READ))
    browser.execute_script(SEEK, 500)
    until(browser, lambda: browser.execute_script(READ))
    assert times(browser) == pytest.approx([1.5, 1.5], abs=0.01)


@pytest.mark.parametrize("late", [False, True])
def test_a_shorter_video_that_is_over_stays_at_its_end(
    late: bool, browser: Chrome, lengths: str
) -> None:
    hold = HOLD_FETCH if late else ""
    held = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": hold})
    try:
        browser.get(lengths)
        until(browser, lambda: min(times(browser)) > 0)
        if not late:
            until(browser, lambda: browser.execute_script(READ))
        button = browser.find_element(By.CSS_SELECTOR, "[data-play]")
        button.click()
        browser.find_element(By.CSS_SELECTOR, "[data-seek]").click()  # has the focus
        browser.execute_script(SEEK, 600)
        until(browser, lambda: times(browser) == pytest.approx([1.8, 1.8, 1.5], abs=0.01))
        browser.execute_script(WATCH)
        button.click()
        if late:
            browser.execute_script("release()")
        until(browser, lambda: times(browser)[0] < 1)
        looks = browser.execute_script("return looks")
        shorter = [look[2] for look in looks if look[0] > 1.9]
        assert shorter
        assert shorter == pytest.approx([1.5] * len(shorter), abs=0.01)
        until(browser, lambda: 0 < times(browser)[2] < 1.4)
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", held)


def test_keys_of_the_browser_stay_its_own(browser: Chrome, page: str) -> None:
    browser.get(page)
    until(browser, lambda: min(times(browser)) > 0)
    browser.find_element(By.CSS_SELECTOR, ".axes").click()
    until(browser, lambda: frame(browser) == 12)
    for held in ("altKey", "ctrlKey", "metaKey", "shiftKey"):
        for key in ("ArrowLeft", "ArrowRight", " "):
            assert browser.execute_script(PRESS, "body", key, held)
    assert browser.execute_script(PRESS, "details pre", "ArrowRight")  # which it scrolls
    assert frame(browser) == 12
    assert not browser.execute_script(PRESS, "body", "ArrowRight")
    until(browser, lambda: frame(browser) == 13)


def test_space_stops_the_videos_after_a_slider_was_used(browser: Chrome, page: str) -> None:
    browser.get(page)
    until(browser, lambda: min(times(browser)) > 0)
    button = browser.find_element(By.CSS_SELECTOR, "[data-play]")
    for name in ("seek", "row"):
        slider = browser.find_element(By.CSS_SELECTOR, f"[data-{name}]")
        slider.send_keys(Keys.HOME)
        before = button.accessible_name
        slider.send_keys(Keys.SPACE)
        assert {before, button.accessible_name} == {"play", "pause"}


def test_frames_and_rows_can_be_chosen_where_videos_were_left_out(
    browser: Chrome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_page, "SPACE", 100)
    browser.get((make_run(tmp_path / "bar") / "report.html").as_uri())
    assert times(browser) == []
    assert len(browser.find_elements(By.CSS_SELECTOR, ".missing")) == 2
    slider = browser.find_element(By.CSS_SELECTOR, "[data-row]")
    image = browser.find_element(By.CSS_SELECTOR, ".slice img")
    box = browser.find_element(By.CSS_SELECTOR, ".slice")
    slider.send_keys(Keys.HOME)
    assert image.rect["y"] == pytest.approx(box.rect["y"], abs=1)
    clock = browser.find_element(By.CSS_SELECTOR, "[data-clock]")
    assert clock.text == "frame 0 · 0.00 s"
    browser.find_element(By.CSS_SELECTOR, ".axes").click()
    assert clock.text == "frame 12 · 1.50 s"
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_RIGHT)
    assert clock.text == "frame 13 · 1.63 s"
    shown = [o.text for o in browser.find_elements(By.CSS_SELECTOR, ".legend output")]
    assert all(float(text) > 0 for text in shown)
    browser.find_element(By.CSS_SELECTOR, "[data-seek]").send_keys(Keys.END)
    assert clock.text.startswith("frame 23")
    assert not browser.find_element(By.CSS_SELECTOR, "[data-play]").is_displayed()


def test_sound_can_be_heard(browser: Chrome, page: str, tmp_path: Path) -> None:
    beeping = make_video(tmp_path / "beeps.mp4", noise(30), sound=beeps([1], 3))
    browser.get((make_run(tmp_path / "bar", sound=beeping) / "report.html").as_uri())
    muted = "return [...document.querySelectorAll('video')].map(v => v.muted)"
    button = browser.find_element(By.CSS_SELECTOR, "[data-sound-switch]")
    assert browser.execute_script(muted) == [True, True]
    button.click()
    assert browser.execute_script(muted) == [True, False]  # the edit's
    button.click()
    assert browser.execute_script(muted) == [True, True]
    browser.get(page)
    assert not browser.find_element(By.CSS_SELECTOR, "[data-sound-switch]").is_displayed()


def test_the_row_can_be_chosen(browser: Chrome, page: str) -> None:
    browser.get(page)
    slider = browser.find_element(By.CSS_SELECTOR, "[data-row]")
    image = browser.find_element(By.CSS_SELECTOR, ".slice img")
    box = browser.find_element(By.CSS_SELECTOR, ".slice")
    slider.send_keys(Keys.HOME)
    assert image.rect["y"] == pytest.approx(box.rect["y"], abs=1)
    slider.send_keys(Keys.ARROW_RIGHT)
    assert image.rect["y"] == pytest.approx(box.rect["y"] - box.rect["height"], abs=1)
    assert image.rect["height"] == pytest.approx(24 * box.rect["height"], abs=1)


def test_a_comparison_plays_and_sorts(browser: Chrome, comparison: str) -> None:
    browser.get(comparison)
    until(browser, lambda: min(times(browser)) > 0.3)
    assert len(times(browser)) == 4
    assert apart(browser) < 0.125

    def order() -> list[str]:
        return [e.text for e in browser.find_elements(By.CSS_SELECTOR, "tbody th")]

    def click(name: str) -> str | None:
        buttons = browser.find_elements(By.CSS_SELECTOR, "thead button")
        (button,) = [b for b in buttons if b.text.split(" ")[0] == name]
        button.click()
        return button.find_element(By.XPATH, "..").get_attribute("aria-sort")

    assert order() == ["run9", "run10", "run11"]
    assert click("warp_error") == "ascending"
    assert order() == ["run10", "run9", "run11"]  # what is missing stays last
    assert click("warp_error") == "descending"
    assert order() == ["run9", "run10", "run11"]
    click("steps")
    assert order() == ["run9", "run10", "run11"]
    click("steps")
    assert order() == ["run11", "run10", "run9"]
    click("run")
    assert order() == ["run9", "run10", "run11"]


def test_words_are_sorted_after_numbers(browser: Chrome, tmp_path: Path) -> None:
    """Numbers and words in one column, so placed that no comparison may call two alike."""
    values = [3, "auto", 1, None, 2, "all"]
    folders = [make_run(tmp_path / f"run{i}", neighbours=v) for i, v in enumerate(values)]
    page = write_comparison([read_run(f) for f in folders], tmp_path / "page.html")
    browser.get(page.as_uri())
    (button,) = [
        b
        for b in browser.find_elements(By.CSS_SELECTOR, "thead button")
        if b.text.split(" ")[0] == "neighbours"
    ]

    def order() -> list[int]:
        rows = browser.find_elements(By.CSS_SELECTOR, "tbody th")
        return [int(row.text.removeprefix("run")) for row in rows]

    button.click()
    assert order() == [2, 4, 0, 5, 1, 3]
    button.click()
    assert order() == [0, 4, 2, 1, 5, 3]


@pytest.mark.parametrize("name", ["page", "comparison"])
def test_a_page_fits_and_can_be_read(
    name: str, browser: Chrome, request: pytest.FixtureRequest
) -> None:
    browser.get(request.getfixturevalue(name))
    for width in (1200, 320):
        for scheme in ("light", "dark"):
            look(browser, width, scheme)
            scroll, inner = browser.execute_script(WIDTH)
            assert inner == width
            assert scroll <= width
            contrasts = browser.execute_script(CONTRAST)
            assert len(contrasts) > 10
            assert min(contrasts) >= 4.5  # WCAG 2.2, 1.4.3, for text of this size


def test_a_page_shows_its_videos_without_scripts(browser: Chrome, page: str) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(page)
        videos = browser.find_elements(By.TAG_NAME, "video")
        assert [video.get_attribute("controls") for video in videos] == ["true", "true"]
        assert not browser.find_element(By.CSS_SELECTOR, ".controls").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_first_column_of_a_comparison_stays_in_sight(browser: Chrome, comparison: str) -> None:
    look(browser, 400)
    browser.get(comparison)
    scroll = browser.find_element(By.CSS_SELECTOR, ".scroll")
    first = browser.find_element(By.CSS_SELECTOR, "tbody th")
    second = browser.find_element(By.CSS_SELECTOR, "tbody td")
    before, moved = first.rect["x"], second.rect["x"]
    browser.execute_script("arguments[0].scrollLeft = 80", scroll)  # type: ignore[no-untyped-call]
    assert first.rect["x"] == before
    assert second.rect["x"] < moved
    at = "return document.elementFromPoint(arguments[0], arguments[1]) === arguments[2]"
    place = browser.execute_script(  # type: ignore[no-untyped-call]
        "const box = arguments[0].getBoundingClientRect(); return [box.right - 4, box.top + 4]",
        first,
    )
    assert browser.execute_script(at, *place, first)  # type: ignore[no-untyped-call]
