"""The report in a real browser: opened from disk, by keyboard and mouse, in both schemes and on a phone's screen.

Needs the extra `browser` and a Chromium of the machine's own (`CHROMIUM` names another); what it sees is kept with
`--basetemp`, and in the folder that the variable `SIMCTG_FAST_SCREENSHOTS` names.
"""

from __future__ import annotations

import copy
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from simctg_fast.evaluation.heat_map import heat_map_svg, heat_maps_svg
from simctg_fast.evaluation.report import render

from . import evaluations
from .test_report_page import HOSTILE, all_hostile

pytestmark = pytest.mark.full
NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, the extra `browser`")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("needs a Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def evaluation() -> dict[str, Any]:
    """Five strategies of the bundled model, and all α and k of the map."""
    return evaluations.of_the_bundled_model(with_grid=True)


@pytest.fixture(scope="module")
def file(evaluation, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(evaluation), encoding="utf-8")
    return path


@pytest.fixture
def open_page(browser):
    """A function that opens a file; what went wrong on the way fails the test at its end."""
    contexts, wrong, asked = [], [], []

    def opened(path: Path, width: int = 1280, **options: Any):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.add_init_script("document.addEventListener('securitypolicyviolation', e => console.log(e.blockedURI))")
        page.goto(path.as_uri())
        return page

    yield opened
    assert wrong == []
    assert all(url.startswith(("file:", "data:image/png")) for url in asked)
    assert len([url for url in asked if url.startswith("file:")]) == len(contexts)
    for context in contexts:
        context.close()


def width_of(page) -> tuple[int, int]:
    return page.evaluate("[document.documentElement.scrollWidth, innerWidth]")


def kept(page, name: str, folder: Path) -> None:
    target = Path(os.environ.get("SIMCTG_FAST_SCREENSHOTS") or folder)
    target.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=target / f"{name}.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768, 390, 320])
def test_fits_the_screen(open_page, file, tmp_path, width, scheme):
    page = open_page(file, width, color_scheme=scheme)
    got, room = width_of(page)
    assert got <= room
    box = page.locator(".wide").first
    assert box.evaluate("e => e.scrollWidth >= e.clientWidth")
    kept(page, f"{width}-{scheme}", tmp_path)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(background[4:].split(",")[0]) > 128) == (scheme == "light")


def test_columns_on_a_wide_screen_and_a_stack_on_a_phone(open_page, file):
    for width, alone in ((1280, False), (390, True)):
        page = open_page(file, width)
        boxes = [one.bounding_box() for one in page.locator("#t-0 .written").all()]
        assert (len({box["x"] for box in boxes}) == 1) == alone


def test_without_a_script_all_texts_are_there(open_page, file, evaluation):
    page = open_page(file, java_script_enabled=False)
    assert page.locator(".prompt:visible").count() == len(evaluation["texts"])
    assert page.locator(".map image").count() == len(evaluation["similarity"])
    assert page.locator("button, select, input").count() == 0
    assert not page.locator(".scripted").is_visible()


def test_choosing_a_prompt(open_page, file, evaluation):
    page = open_page(file)
    assert page.locator(".prompt:visible").count() == 1
    select = page.get_by_label("Prompt", exact=True)
    assert select.locator("option").count() == len(evaluation["texts"])
    select.select_option(index=2)
    assert page.locator(".prompt:visible").get_attribute("id") == "t-2"
    page.get_by_role("button", name="Next").click()
    assert page.locator(".prompt:visible").get_attribute("id") == "t-3"
    assert "4." in page.locator("#said").inner_text()
    page.get_by_role("button", name="Next").press("Enter")
    assert page.get_by_role("button", name="Next").is_disabled()
    assert select.evaluate("e => e === document.activeElement"), "the focus must not be lost with the button"
    page.get_by_role("button", name="Previous").press("Space")
    assert page.locator(".prompt:visible").get_attribute("id") == "t-3"


def test_choosing_strategies(open_page, file):
    page = open_page(file)
    before = page.locator(".written:visible").count()
    page.get_by_role("checkbox", name="greedy search").uncheck()
    page.get_by_role("checkbox", name="GUARD").uncheck()
    assert page.locator(".written:visible").count() == before - 2
    page.get_by_role("button", name="Next").click()
    assert page.locator(".written:visible").count() == before - 2
    page.get_by_role("checkbox", name="GUARD").check()
    assert page.locator(".written:visible").count() == before - 1


def test_keyboard_walk(open_page, file):
    """From the top to the bottom by Tab alone: each thing once, in the order of the page, and in sight."""
    page = open_page(file, reduced_motion="reduce")
    seen = []
    for _ in range(200):
        page.keyboard.press("Tab")
        here = page.evaluate("""() => {
            const e = document.activeElement, box = e.getBoundingClientRect(), style = getComputedStyle(e);
            if (e === document.body) return null;
            const order = [...document.querySelectorAll("*")].indexOf(e);
            const outline = [style.outlineStyle, parseFloat(style.outlineWidth)];
            return [e.tagName, order, ...outline, box.top, box.bottom, e.className];
        }""")
        if here is None:
            break
        seen.append(here)
    orders = [one[1] for one in seen]
    assert orders == sorted(set(orders))
    assert seen[0][0] == "A"
    assert all(one[2] != "none" and one[3] >= 1 for one in seen)
    assert all(one[5] > 0 and one[4] < 900 for one in seen), "out of sight"
    tags = [one[0] for one in seen]
    assert {"A", "SELECT", "BUTTON", "INPUT", "SUMMARY", "DIV"} <= set(tags)
    assert sum(one[6] == "field" for one in seen) == page.locator(".field").count()


def test_the_skip_link(open_page, file):
    page = open_page(file)
    page.keyboard.press("Tab")
    assert page.get_by_text("To the content").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"


def readout(page, place: int = 0) -> str:
    return page.locator(".map").nth(place).locator(".cosine").inner_text()


def shown_cosine(text: str) -> tuple[float, int, int]:
    words = text.split()
    places = [int(after) for before, after in itertools.pairwise(words) if before == "token"]
    return float(text.split(" — ")[0].replace("−", "-")), *places[:2]


def test_heat_map_by_keyboard(open_page, file, evaluation):
    page = open_page(file)
    one = evaluation["similarity"][1]
    size = len(one["pieces"])
    assert readout(page, 1).startswith("Most alike")
    page.locator(".field").nth(1).focus()
    page.keyboard.press("Home")
    assert shown_cosine(readout(page, 1)) == (1.0, 0, 0)
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "Shift+ArrowDown", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    value, row, column = shown_cosine(readout(page, 1))
    assert (row, column) == (12, 0)
    assert value == pytest.approx(one["cosines"][12][0], abs=0.011)
    assert page.locator("#said").inner_text() == readout(page, 1)
    page.keyboard.press("End")
    page.keyboard.press("ArrowDown")
    assert shown_cosine(readout(page, 1))[1:] == (size - 1, size - 1)
    assert page.locator(".map").nth(1).locator(".cross[d]").count() == 2
    page.keyboard.press("Tab")
    assert page.locator(".map").nth(1).locator(".cross[d]").count() == 0


def cell_of(page, place: int, row: int, column: int, size: int) -> tuple[float, float]:
    box = page.locator(".map").nth(place).locator("image").bounding_box()
    return box["x"] + (column + 0.5) * box["width"] / size, box["y"] + (row + 0.5) * box["height"] / size


def test_heat_map_by_mouse(open_page, file, evaluation):
    page = open_page(file)
    one = evaluation["similarity"][2]
    page.locator(".map").nth(2).scroll_into_view_if_needed()
    for row, column in ((40, 3), (3, 40), (0, 0), (len(one["pieces"]) - 1, 7)):
        page.mouse.move(*cell_of(page, 2, row, column, len(one["pieces"])))
        value, *found = shown_cosine(readout(page, 2))
        assert found == [row, column]
        assert value == pytest.approx(one["cosines"][row][column], abs=0.011)
    marked = page.locator(".map").nth(2).locator(".context b").all_inner_texts()
    assert marked == [one["pieces"][-1].replace("\n", "⏎"), one["pieces"][7].replace("\n", "⏎")]


def test_heat_map_by_touch(open_page, file, evaluation):
    page = open_page(file, 390, has_touch=True)
    page.locator(".map").first.scroll_into_view_if_needed()
    page.touchscreen.tap(*cell_of(page, 0, 30, 10, len(evaluation["similarity"][0]["pieces"])))
    assert shown_cosine(readout(page))[1:] == (30, 10)


def test_copy(open_page, file, evaluation):
    page = open_page(file)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    buttons = page.get_by_role("button", name="Copy")
    codes = [row[key] for row in evaluation["rows"] for key in ("command", "python") if row[key]]
    assert buttons.count() == len(codes) + 1
    for place, text in ((0, codes[0]), (3, codes[3]), (len(codes), evaluation["command"])):
        buttons.nth(place).press("Enter")
        page.wait_for_function("document.getElementById('said').textContent === 'Copied'")
        assert page.evaluate("navigator.clipboard.readText()") == text
    names = [button.get_attribute("aria-label") for button in buttons.all()]
    assert len(set(names)) == len(names)


def test_colour_contrast_of_every_text(open_page, file):
    """Against what is behind it, as the browser has computed both."""
    for scheme in ("light", "dark"):
        page = open_page(file, color_scheme=scheme)
        low = page.evaluate("""() => {
            const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
            const light = (color) => {
                const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
                const [r, g, b] = color.map((v) => linear(v / 255));
                return .2126 * r + .7152 * g + .0722 * b;
            };
            const behind = (e) => {
                for (; e; e = e.parentElement) {
                    const color = rgb(getComputedStyle(e).backgroundColor);
                    if (color.length === 3 || color[3] > 0) return color;
                }
            };
            const low = [];
            const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            while (walker.nextNode()) {
                const e = walker.currentNode.parentElement;
                if (!walker.currentNode.data.trim() || !e.checkVisibility()) continue;
                if (e.matches("script, option, :disabled, .skip, title, desc")) continue;
                const style = getComputedStyle(e);
                const front = rgb(e.closest("svg") ? style.fill : style.color);
                const [dark, bright] = [light(front.slice(0, 3)), light(behind(e).slice(0, 3))].sort((a, b) => a - b);
                const ratio = (bright + .05) / (dark + .05);
                if (ratio < 4.5) low.push([e.className.toString(), walker.currentNode.data, ratio]);
            }
            return low;
        }""")
        assert low == []


def test_reduced_motion_and_forced_colours(open_page, file, tmp_path):
    page = open_page(file, reduced_motion="reduce", forced_colors="active")
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    assert page.evaluate("getComputedStyle(document.querySelector('mark')).textDecorationLine") == "underline"
    kept(page, "forced-colors", tmp_path)


def test_printed(open_page, file, evaluation, tmp_path):
    page = open_page(file)
    page.emulate_media(media="print")
    assert page.locator(".prompt:visible").count() == len(evaluation["texts"])
    assert page.locator("nav:visible, button:visible, select:visible").count() == 0
    target = Path(os.environ.get("SIMCTG_FAST_SCREENSHOTS") or tmp_path)
    page.pdf(path=target / "report.pdf", format="A4")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_texts(open_page, tmp_path, hostile):
    """Nothing runs, nothing is asked for, nothing sticks out; and the controls still work."""
    path = tmp_path / "hostile.html"
    path.write_text(render(all_hostile(evaluations.example(prompts=2), hostile)), encoding="utf-8")
    page = open_page(path, 390)
    got, room = width_of(page)
    assert got <= room
    page.get_by_role("button", name="Next").click()
    assert page.locator(".prompt:visible").get_attribute("id") == "t-1"
    page.locator(".field").first.focus()
    page.keyboard.press("End")
    assert readout(page).startswith("1.00 — token 39")
    assert page.evaluate("document.images.length + document.scripts.length") == 2


def test_odd_pages(open_page, tmp_path):
    """Little in it, or much."""
    one = evaluations.example(prompts=1)
    one["rows"], few = one["rows"][:1], copy.deepcopy(one)
    few["grid"] = few["texts"] = few["similarity"] = None
    path = tmp_path / "odd.html"
    for odd in (few, {"model": "m", "metrics": {}, "rows": []}, evaluations.example(prompts=12, size=160)):
        path.write_text(render(odd), encoding="utf-8")
        page = open_page(path, 390)
        got, room = width_of(page)
        assert got <= room


def test_heat_map_files(open_page, tmp_path):
    """An SVG file of its own, opened from disk."""
    words = evaluations.WORDS[:12]
    maps = [("before", evaluations.cosines(12, 1.2), words), ("after", evaluations.cosines(12, 0.3), words)]
    for name, text in (
        ("two", heat_maps_svg(maps)),
        ("one", heat_map_svg(evaluations.cosines(90, 0.5), prompt_tokens=20)),
    ):
        path = tmp_path / f"{name}.svg"
        path.write_text(text, encoding="utf-8")
        page = open_page(path)
        assert page.locator("image").first.bounding_box()["width"] == 360
        target = Path(os.environ.get("SIMCTG_FAST_SCREENSHOTS") or tmp_path)
        page.screenshot(path=target / f"heat-map-{name}.png")
