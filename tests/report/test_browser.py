"""The page in a real browser, opened from disk: what it says after a click is what the files say.

Screenshots at two widths go to the folder named by EXCISE_SCREENSHOTS, else to a temporary one.
"""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from excise.report.material import gather
from excise.report.page import write_page
from excise.text import ranges
from tests.report.folders import HOSTILE, full_folder

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed; pip install -e '.[dev]'")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
WIDE, NARROW = 1280, 375
SWITCHES = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(
        not (BROWSER and DRIVER), reason="no Chromium with chromedriver; `make test-browser` installs them"
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with its page, whose names try to break out of the markup."""
    folder = tmp_path_factory.mktemp("browser") / "run"
    facts = full_folder(folder, name=HOSTILE, repaired=True)
    write_page(gather(folder))
    return folder, facts


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture
def page(driver, run):
    """The page, freshly opened at full width; afterwards: no console message, no request but for the file itself."""
    resize(driver, WIDE)
    driver.get("about:blank")
    for log in ("browser", "performance"):  # the browser's own start page
        driver.get_log(log)
    driver.get((run[0] / "report.html").as_uri())
    yield driver
    assert driver.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked
    assert all(url.startswith(("file:", "data:")) for url in asked), asked


def resize(driver, width, dark=False):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == NARROW}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    still = {"name": "prefers-reduced-motion", "value": "reduce"}  # scrolling smoothly, a click would miss
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme, still]})


def said(page, name):
    return page.find_element(By.ID, name).text


def removed(page):
    return [int(c.get_attribute("data-block")) for c in page.find_elements(By.CSS_SELECTOR, "#strip li.removed")]


def spaced(indices):
    return ranges(indices).replace(",", ", ")


def rgb(element, name):
    return tuple(map(int, re.findall(r"\d+", element.value_of_css_property(name))[:3]))


def signed(value):
    return f"{'−' if value < 0 else '+'}{abs(value):.3f}"


def test_it_opens_with_what_the_run_removed(page, run):
    _, facts = run
    assert page.find_element(By.TAG_NAME, "h1").text == HOSTILE
    assert removed(page) == facts["removed"]
    assert said(page, "selection-removed") == spaced(facts["removed"])
    assert said(page, "selection-name") == f"Removed by this run: {page.find_element(By.TAG_NAME, 'strong').text}"
    before, after = (signed(facts[key] - facts["base_loss"]) for key in ("pruned_loss", "checkpoint_loss"))
    assert said(page, "selection-damage").startswith(f"Δ loss {before}, repaired {after}, ")
    assert "rank 1 of" in said(page, "selection-damage")
    assert said(page, "budget-value") == "3 of 12"


def test_the_slider_moves_to_another_budget(page, run):
    folder, facts = run
    spectra = {s["budget"]: s for s in json.loads((folder / "spectra-fisher.json").read_text())["spectra"]}
    slider = page.find_element(By.ID, "budget")
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert said(page, "budget-value") == "5 of 12"
    assert slider.get_attribute("aria-valuetext") == "5 of 12 blocks"
    assert removed(page) == spectra[5]["states"][0]["removed"]
    assert said(page, "selection-name") == "Ground state of fisher"
    rows = page.find_elements(By.CSS_SELECTOR, "#spectrum tbody tr")
    assert len(rows) == len(spectra[5]["states"])
    assert "not measured" in said(page, "selection-damage")
    cells = page.find_elements(By.CSS_SELECTOR, "#frequency-table tbody td")
    counts = [int(cell.get_attribute("textContent")) for cell in cells]
    assert counts == [sum(block in s["removed"] for s in spectra[5]["states"]) for block in range(12)]
    slider.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert removed(page) == facts["removed"]


def test_a_state_tells_its_blocks_energy_and_damage(page, run):
    folder, facts = run
    states = json.loads((folder / "spectrum-fisher.json").read_text())["states"]
    page.find_element(By.CSS_SELECTOR, "#spectrum tbody tr:nth-child(2) button").click()
    assert removed(page) == states[1]["removed"]
    energy = float(said(page, "selection-energy").split()[0].replace("−", "-"))
    assert energy == pytest.approx(states[1]["energy"], rel=1e-5)
    measured = next(c for c in facts["candidates"] if c["removed"] == states[1]["removed"])
    assert signed(measured["delta"]) in said(page, "selection-damage")
    pressed = page.find_element(By.CSS_SELECTOR, "#spectrum tbody tr:nth-child(2) button").get_attribute("aria-pressed")
    assert pressed == "true"
    page.find_element(By.CSS_SELECTOR, "#spectrum tbody tr:nth-child(9) button").click()
    assert "not measured" in said(page, "selection-damage")
    page.find_element(By.ID, "back-to-run").click()
    assert removed(page) == facts["removed"]


def test_a_proposal_and_a_point_of_the_chart_show_theirs(page, run):
    _, facts = run
    page.find_element(By.CSS_SELECTOR, "#measured tbody tr:last-child button").click()
    assert removed(page) == facts["candidates"][-1]["removed"]
    mark = page.find_element(By.CSS_SELECTOR, ".wide .mark[data-removed]")
    ActionChains(page).move_to_element(mark).click().perform()
    assert ",".join(map(str, removed(page))) == mark.get_attribute("data-removed")
    assert page.find_element(By.ID, "tip").is_displayed()


def test_the_matrix_tells_the_entry_under_the_pointer_and_the_keys(page, run):
    energy = gather(run[0]).energies["fisher"]
    box = page.find_element(By.ID, "matrix")
    cell = box.rect["width"] / 12
    # Offsets count from the middle: this is row 2, column 7.
    ActionChains(page).move_to_element_with_offset(box, int(1.5 * cell), int(-3.5 * cell)).perform()
    assert said(page, "matrix-value").startswith("blocks 2 and 7: J = ")
    value = float(said(page, "matrix-value").split("J = ")[1].split(",")[0].replace("−", "-"))
    assert value == pytest.approx(energy.J[2, 7], rel=1e-3)
    box.send_keys(Keys.ARROW_DOWN, Keys.ARROW_LEFT)
    assert said(page, "matrix-value").startswith("blocks 3 and 6: J = ")
    page.find_element(By.CSS_SELECTOR, 'input[name="matrix"][value="correlations"] + span').click()
    assert page.find_element(By.CSS_SELECTOR, '#matrix [data-view="correlations"]').is_displayed()
    assert not page.find_element(By.CSS_SELECTOR, '#matrix [data-view="values"]').is_displayed()


def test_the_keyboard_reaches_everything_in_view(page):
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert page.switch_to.active_element.get_attribute("class") == "skip"
    reached = set()
    for _ in range(40):
        page.switch_to.active_element.send_keys(Keys.TAB)
        active = page.switch_to.active_element
        reached.add(active.get_attribute("id") or active.get_attribute("name") or active.tag_name)
    assert {"a", "budget", "energy", "button"} <= reached


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_the_screen(page, width, dark, tmp_path):
    resize(page, width, dark)
    page.refresh()
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    shown = page.find_element(By.CSS_SELECTOR, "#prediction .narrow").is_displayed()
    assert shown == (width == NARROW)
    height = page.execute_script("return document.documentElement.scrollHeight")
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width == NARROW,
    })  # fmt: skip
    folder = Path(os.environ.get("EXCISE_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"report-{width}-{'dark' if dark else 'light'}.png"
    assert page.save_screenshot(str(picture))
    assert picture.stat().st_size > 20_000


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_what_decides_is_in_view_without_scrolling(page, run, width):
    _, facts = run
    resize(page, width)
    page.refresh()
    for table, columns in (("spectrum", (2, 3)), ("measured", (2, 3))):
        box = page.find_element(By.ID, table).find_element(By.XPATH, "..").rect
        for column in columns:
            cell = page.find_element(By.CSS_SELECTOR, f"#{table} tbody tr:first-child > :nth-child({column})")
            assert cell.is_displayed()
            assert cell.rect["x"] + cell.rect["width"] <= box["x"] + box["width"]
    first = page.find_elements(By.CSS_SELECTOR, "#measured tbody tr:first-child > *")
    assert [first[1].text, first[2].text] == [
        signed(facts[key] - facts["base_loss"]) for key in ("pruned_loss", "checkpoint_loss")
    ]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_what_goes_is_not_green(page, dark):
    resize(page, WIDE, dark)
    page.refresh()
    cell = page.find_element(By.CSS_SELECTOR, "#strip li.removed")
    red, green, blue = rgb(cell, "background-color")
    assert green <= max(red, blue)
    mark = page.find_element(By.CSS_SELECTOR, "#frequency .wide .removed-mark:not([display])")
    assert rgb(mark, "fill") == (red, green, blue)


def test_the_map_of_couplings_keeps_their_signs(page, run):
    """Blue cells where J is below 0, red ones where it is above."""
    energy = gather(run[0]).energies["fisher"]
    i, j = np.unravel_index(energy.J.argmin(), energy.J.shape)
    assert energy.J[i, j] < 0 < energy.J.max()
    fills = page.execute_script(
        "return [...document.querySelectorAll('[data-view=values] g[shape-rendering]')[0].children]"
        ".map((path) => [path.getAttribute('fill'), path.getAttribute('d')])"
    )
    (lowest,) = [fill for fill, d in fills if any(
        int(row) == i and int(start) <= j < int(start) + int(width)
        for start, row, width in re.findall(r"M(\d+) (\d+)h(\d+)", d)
    )]  # fmt: skip
    red, blue = int(lowest[1:3], 16), int(lowest[5:], 16)
    assert blue > red


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_capabilities_and_answers_stand_side_by_side(page, width):
    resize(page, width)
    page.refresh()
    section = page.find_element(By.ID, "capabilities")
    shown = section.find_element(By.CSS_SELECTOR, ".narrow" if width == NARROW else ".wide")
    assert shown.is_displayed()
    assert len(shown.find_elements(By.CSS_SELECTOR, ".mark")) == 4
    answers = section.find_element(By.XPATH, ".//summary[contains(., 'before and after')]")
    answers.click()
    first, second = section.find_elements(By.CSS_SELECTOR, ".answers dd")[:2]
    assert first.is_displayed()
    beside = first.rect["y"] == second.rect["y"]
    assert beside == (width == WIDE)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_damage_against_the_budget_is_there_without_another_command(page, width):
    resize(page, width)
    page.refresh()
    section = page.find_element(By.ID, "budgets")
    shown = section.find_element(By.CSS_SELECTOR, ".narrow" if width == NARROW else ".wide")
    assert shown.is_displayed()
    tips = [mark.get_attribute("data-tip") for mark in shown.find_elements(By.CSS_SELECTOR, ".mark")]
    assert any(tip.startswith("as written: ") for tip in tips)
    assert any(tip.startswith("predicted: ") for tip in tips)


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_predicted_speed_stands_beside_measured(page, run, width):
    speed = run[1]["speed"]
    resize(page, width)
    page.refresh()
    rows = page.find_elements(By.CSS_SELECTOR, "#speed tbody tr")
    assert len(rows) == len(speed["predicted"])
    for row, part in zip(rows, ("request", "prefill", "decode"), strict=True):
        predicted, measured = row.find_elements(By.TAG_NAME, "td")[:2]
        assert predicted.text == f"{speed['predicted'][part]:.2f}"
        assert measured.text == f"{speed['measured'][part]:.2f}"
        assert measured.is_displayed()
        assert measured.rect["x"] + measured.rect["width"] <= width


def test_print_shows_every_row_and_no_controls(page):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not page.find_element(By.ID, "budget").is_displayed()
    assert page.find_element(By.CSS_SELECTOR, "#spectrum tbody tr:last-child").is_displayed()
    assert len(page.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]) > 50_000
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
