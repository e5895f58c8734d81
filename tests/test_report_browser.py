"""The report in a real headless Chromium: clicked, filtered, hovered, by keyboard alone, in the dark and offline.

`MOEGATE_SCREENSHOT=FILE` keeps a picture of the page.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from history_runs import commit_id, record, stored
from needed import need
from report_inputs import COMMITS, HOSTILE, STEP_AT, check_report, faults_report, fill_history, gate_record
from typer.testing import CliRunner

from moegate import exit_codes
from moegate.bench.history.store import Store
from moegate.main import app

need("selenium", "jinja2", "plotly", "ruptures")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.select import Select  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

STILL = {"name": "prefers-reduced-motion", "value": "reduce"}  # a click does not wait for a smooth scroll
LAST = commit_id(COMMITS - 1)[:10]


def find_programs():
    """Chromium and its driver, as Debian, Ubuntu's runners and others name them."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    return browser, shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser():
    program, driver = find_programs()
    if program is None or driver is None:
        reason = "Chromium or chromedriver is not installed (Debian: apt-get install chromium chromium-driver)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    started.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    started.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield started
    started.quit()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of `report_inputs`, in which every text that can be is hostile."""
    folder = tmp_path_factory.mktemp("report")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    fill_history(folder / "history")
    hostile = {**record(9e-6), "model": HOSTILE, "subject": HOSTILE, "routing": HOSTILE, "workload": HOSTILE}
    hostile["path"] = {"backend": [HOSTILE]}
    stored(Store(folder / "history"), hostile, commit=COMMITS, time=COMMITS)
    gate = gate_record(notes=[HOSTILE])
    arguments = ["report", "-o", str(folder / "report.html"), "--store", str(folder / "history")]
    for name, data in (("gate", gate), ("check", check_report()), ("faults", faults_report())):
        (folder / f"{name}.json").write_text(json.dumps(data))
        arguments += [f"--{name}", str(folder / f"{name}.json")]
    done = CliRunner().invoke(app, arguments)
    os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)
    assert done.exit_code == exit_codes.HOLDS, done.output
    return folder / "report.html"


@pytest.fixture
def page(browser, written):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [STILL]})
    for log in ("browser", "performance"):  # of the test before
        browser.get_log(log)
    browser.get(written.as_uri())
    choose(browser, "model", "qwen3-30b-a3b")
    return browser


def find(page, selector):
    return page.find_element(By.CSS_SELECTOR, selector)


def choose(page, name, text):
    Select(find(page, f"#filter-{name}")).select_by_visible_text(text)


def options_of(page, name):
    return [option.text for option in Select(find(page, f"#filter-{name}")).options]


def rows(page, table):
    return [row.text for row in page.find_elements(By.CSS_SELECTOR, f"#{table} tbody tr") if row.is_displayed()]


def test_the_page_asks_for_nothing_and_runs_without_an_error(page):
    sent = [json.loads(line["message"])["message"] for line in page.get_log("performance")]
    urls = {one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"}
    assert {url.split(":", maxsplit=1)[0] for url in urls} <= {"file", "data", "blob"}
    assert [url for url in urls if url.startswith("file")] == [page.current_url]
    assert [line for line in page.get_log("browser") if line["level"] in ("SEVERE", "WARNING")] == []


def test_what_the_data_says_is_text_and_never_runs(page):
    choose(page, "model", HOSTILE)
    ActionChains(page).move_to_element(find(page, "#trend")).perform()
    assert page.title == "moegate report"
    assert HOSTILE in find(page, "#trend-said").text
    assert HOSTILE in find(page, "#trend").get_attribute("aria-label")
    assert HOSTILE in page.find_element(By.ID, "gate-section").text
    assert page.find_elements(By.CSS_SELECTOR, "img[onerror]") == []


def test_filters_narrow_each_other_and_redraw_the_chart(page):
    choose(page, "device", "NVIDIA H200")
    assert options_of(page, "device") == ["NVIDIA H100", "NVIDIA H200"]
    assert options_of(page, "num_tokens") == ["1", "8", "512"]
    choose(page, "num_tokens", "8")
    assert options_of(page, "routing") == ["uniform-s0", "zipf1.2-s0"]
    choose(page, "routing", "uniform-s0")
    assert "M = 8, uniform-s0, bf16 on NVIDIA H200: 30 commits, 1 change points" in label_of(page)
    assert f"at {commit_id(STEP_AT)[:10]}" in find(page, "#trend .annotation-text").text
    choose(page, "device", "NVIDIA H100")
    assert options_of(page, "num_tokens") == ["8"]  # nothing else ran there, and nothing of another GPU is shown
    assert "on NVIDIA H100: 30 commits, 0 change points" in label_of(page)
    assert "M = 8" in find(page, "#floor-said").text


def label_of(page):
    return find(page, "#trend").get_attribute("aria-label")


def test_a_click_on_a_series_shows_it(page):
    search = find(page, "[data-rows=series-table]")
    search.send_keys("mixtral")
    assert len(rows(page, "series-table")) == 1
    find(page, "#series-table tbody tr:not([hidden]) button").click()
    assert "mixtral-8x7b, M = 8" in label_of(page)
    assert find(page, "#series-table tr[aria-selected=true]").text.startswith("mixtral-8x7b")
    assert Select(find(page, "#filter-model")).first_selected_option.text == "mixtral-8x7b"
    search.send_keys(Keys.CONTROL, "a", Keys.DELETE)
    assert len(rows(page, "series-table")) == 7


def test_a_commit_under_the_pointer_is_told(page):
    points = page.find_elements(By.CSS_SELECTOR, "#trend .scatterlayer .trace .points path")
    assert len(points) == COMMITS
    ActionChains(page).move_to_element(points[4]).perform()
    hover = WebDriverWait(page, 20).until(lambda page: page.find_elements(By.CSS_SELECTOR, "#trend .hoverlayer text"))
    assert commit_id(4)[:10] in hover[0].text
    assert commit_id(4)[:10] in find(page, "#trend-said").text
    assert "times the floor" in find(page, "#trend-said").text


def test_everything_is_reached_and_read_by_keyboard_alone(page):
    reached = []
    for _ in range(60):
        ActionChains(page).send_keys(Keys.TAB).perform()
        focused = page.switch_to.active_element
        reached.append(focused.get_attribute("id") or focused.get_attribute("class") or focused.tag_name)
        if reached[-1] == "trend":
            break
    assert reached[0] == "skip"
    assert {"theme", "filter-device", "filter-cache"} <= set(reached)
    assert reached[-1] == "trend"
    assert find(page, "#trend-said").text.startswith(LAST)
    ActionChains(page).send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT).perform()
    assert find(page, "#trend-said").text.startswith(commit_id(COMMITS - 3)[:10])
    assert page.find_elements(By.CSS_SELECTOR, "#trend .hoverlayer text")
    ActionChains(page).send_keys(Keys.HOME, Keys.ARROW_RIGHT).perform()
    assert find(page, "#trend-said").text.startswith(commit_id(1)[:10])
    summary = find(page, "#oracle-table summary")
    page.execute_script("arguments[0].focus()", summary)
    summary.send_keys(Keys.ENTER)
    assert find(page, "#oracle-table details").get_attribute("open")
    assert "triton" in find(page, "#oracle-table details ul").text


def test_light_and_dark_follow_the_system_and_the_button(page):
    def back():
        return page.execute_script("return getComputedStyle(document.body).backgroundColor")

    def paper():
        return page.execute_script("return document.getElementById('trend').layout.paper_bgcolor")

    assert (back(), paper()) == ("rgb(255, 255, 255)", "#fff")
    find(page, "#theme").click()
    assert (back(), paper()) == ("rgb(13, 17, 23)", "#0d1117")
    assert find(page, "#theme").text == "Light"
    find(page, "#theme").click()
    assert back() == "rgb(255, 255, 255)"
    page.refresh()
    dark = {"features": [STILL, {"name": "prefers-color-scheme", "value": "dark"}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    WebDriverWait(page, 20).until(lambda _: (back(), paper()) == ("rgb(13, 17, 23)", "#0d1117"))


def test_verdicts_properties_and_faults_are_filtered(page):
    verdicts = Select(find(page, "[data-verdicts=gate-1]"))
    assert [option.text for option in verdicts.options] == ["all", "FASTER", "MISSING", "SAME", "SLOWER"]
    verdicts.select_by_visible_text("SLOWER")
    (slower,) = rows(page, "gate-1")
    assert "+4.0%" in slower
    assert "assignment: naive -> aligned" in slower
    find(page, "[data-rows=check-1]").send_keys("violated")
    assert [row[:8] for row in rows(page, "check-1")] == ["ROUTE-03"]
    seen = [
        [cell.text for cell in row.find_elements(By.TAG_NAME, "td")]
        for row in page.find_elements(By.CSS_SELECTOR, "#faults-1 tfoot tr")
    ]
    assert seen == [["1", "1", "1"], ["0", "0", "1"]]  # NUM-01 and NUM-03 saw the same fault, META-02 none
    assert "graph-stale was not planted: there is no GPU here" in find(page, "#faults-section").text
    find(page, "[data-rows=faults-1]").send_keys("survives quant")
    (survivor,) = rows(page, "faults-1")
    assert "scale-twice" in survivor


def test_the_axis_starts_at_zero_where_that_is_asked_for(page):
    choose(page, "device", "NVIDIA H200")

    def bottom():
        return page.execute_script("return document.getElementById('trend').layout.yaxis.range[0]")

    assert bottom() > 20
    find(page, "#from-zero").click()
    assert bottom() == 0


def test_a_picture_of_the_page_is_kept(browser, written, tmp_path):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [STILL]})
    browser.get(os.environ.get("MOEGATE_SCREENSHOT_OF") or written.as_uri())
    picture = Path(os.environ.get("MOEGATE_SCREENSHOT") or tmp_path / "report.png")
    assert browser.save_screenshot(str(picture))
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 30_000  # a blank page is a tenth of it
