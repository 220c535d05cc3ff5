"""The report in a real browser, from disk and with the network off."""

import json
import shutil

import pytest

from agentopd.report import build_report
from agentopd.report.charts import Series
from agentopd.report.collect import collect
from agentopd.report.curves import write_curves_page
from agentopd.report.inspector import view

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install axe-playwright-python")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
PAGES = ("overview", "learning", "retention", "signal", "cost", "episodes")
WIDE, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    """Opens a file with the network off; at the end, nothing may have gone wrong or been asked of a network."""
    complaints, contexts = [], []

    def open_(path, fragment="", scheme="light", viewport=WIDE):
        contexts.append(browser.new_context(offline=True, color_scheme=scheme, viewport=viewport))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}"))
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or complaints.append(r.url))
        page.goto(f"{path.as_uri()}{fragment}")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def report(finished):
    return build_report(finished.path)


def test_the_report_of_a_run_of_200_steps_is_small(finished, open_page):
    lines = [kept.model_dump_json() for kept in finished.kept_episodes()]
    for step in range(121, 201):
        (finished.episodes / f"step_{step:06d}.jsonl").write_text("\n".join(lines) + "\n")
    path = build_report(finished.path)
    assert 1_000_000 < path.stat().st_size < 5_000_000
    page = open_page(path)
    page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
    assert page.locator("#overview h2").first.is_visible()


def test_every_page_opens_by_its_name_and_by_its_key(report, open_page):
    page = open_page(report)
    for number, name in enumerate(PAGES, start=1):
        page.keyboard.press(str(number))
        assert page.locator("main > section:visible").evaluate_all("all => all.map((s) => s.id)") == [name]
        assert page.locator("nav a[aria-current=page]").get_attribute("href") == f"#{name}"
    assert open_page(report, "#signal").locator("#signal h2").is_visible()


def test_filters_narrow_the_list(report, open_page, finished):
    kept = [view(item) for item in finished.kept_episodes()]
    page = open_page(report, "#episodes")

    def shown():
        return page.locator("#list li").count()

    assert shown() == len(kept) == 12
    page.select_option("#by-skill", "repair")
    assert shown() == sum(e["skill"] == "repair" for e in kept)
    page.select_option("#by-outcome", "failed")
    assert shown() == sum(e["skill"] == "repair" and e["class"] == "failed" for e in kept)
    page.select_option("#by-skill", "")
    page.select_option("#by-outcome", "")
    page.select_option("#by-status", "infra_error")
    assert shown() == sum(e["status"] == "infra_error" for e in kept)
    page.select_option("#by-status", "")
    page.fill("#from-step", "40")
    page.fill("#to-step", "80")
    assert shown() == sum(40 <= e["step"] <= 80 for e in kept) == 6
    page.fill("#by-text", "hardcoded")
    assert shown() == sum(40 <= e["step"] <= 80 and bool(e["flags"]) for e in kept)
    page.fill("#by-text", "no such words")
    assert shown() == 0 and page.locator("#count").inner_text() == "0 episodes"


def test_exact_numbers_on_hover_and_on_focus(report, open_page, finished):
    turn = view(next(finished.kept_episodes()))["turns"][0]
    gap = turn["teacher"][1] - turn["student"][1]
    page = open_page(report, "#episodes")
    told = page.locator("#tip")
    page.locator(".tok").nth(1).hover()
    assert told.is_visible()
    hovered = told.inner_text()
    assert f"{turn['student'][1]:.3f}" in hovered and f"{turn['teacher'][1]:.3f}" in hovered
    assert f"{abs(gap):.3f} nats" in hovered and "final weight" in hovered
    page.mouse.move(0, 0)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.place") == 1
    assert told.inner_text() == hovered
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert "masked" in told.inner_text() and "special" in told.inner_text()


def test_keys_walk_through_episodes_and_colours(report, open_page):
    page = open_page(report, "#episodes")

    def selected():
        return page.locator("#list [aria-selected=true]").get_attribute("id")

    page.keyboard.press("j")
    assert selected() == "episode-1"
    page.locator("#list").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("k")
    assert selected() == "episode-1"
    gap = page.locator("#strip .more").get_attribute("d")
    legends = []
    for colour in ("gate", "mask", "weight", "student"):
        page.keyboard.press("c")
        assert page.locator("#by-colour input:checked").get_attribute("value") == colour
        legends.append(page.locator("#legend").inner_text())
    assert page.locator("#strip .more").get_attribute("d") != gap
    assert "consensus" in legends[0] + legends[1] and "special 2" in legends[1]
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "by-text"


def test_a_chart_reads_out_step_by_step(report, open_page):
    page = open_page(report)
    page.locator("#overview .plot").focus()
    page.keyboard.press("ArrowLeft")
    assert "step 90" in page.locator("#tip").inner_text() and "95" not in page.locator("#tip").inner_text()[:7]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_stands_in_the_way_of_assistive_technology(report, open_page, scheme):
    found = []
    for name in PAGES:
        page = open_page(report, f"#{name}", scheme)
        for colour in ("gap", "gate") if name == "episodes" else ("",):
            if colour == "gate":
                page.keyboard.press("c")
            violations = axe.Axe().run(page).response["violations"]
            found += [
                (name, item["id"], item["nodes"][0]["html"][:120], item["nodes"][0]["failureSummary"])
                for item in violations
                if item["impact"] in ("serious", "critical")
            ]
    assert not found, json.dumps(found, indent=1)


def test_a_phone_needs_no_sideways_scrolling(report, open_page):
    for name in PAGES:
        page = open_page(report, f"#{name}", viewport=PHONE)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], name


def test_the_theme_can_be_chosen(report, open_page):
    page = open_page(report, scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.locator("#theme").click()
    assert page.evaluate(background) != dark and page.locator("#theme").inner_text() == "Theme: light"


def test_a_comparison_reads_out_too(open_page, tmp_path):
    series = {
        "repair": [Series("sft", [(0, 0.2), (5, 0.4)], [(0.1, 0.3), (0.3, 0.5)]), Series("opd", [(0, 0.2), (5, 0.6)])]
    }
    path = write_curves_page("race", "three seeds", ("arm", "seeds"), [("sft", "3"), ("opd", "3")], series, tmp_path)
    page = open_page(path)
    page.locator(".plot").focus()
    page.keyboard.press("ArrowLeft")
    assert "20 % (10 % to 30 %)" in page.locator("#tip").inner_text()
    violations = axe.Axe().run(page).response["violations"]
    assert not [item["id"] for item in violations if item["impact"] in ("serious", "critical")]


def test_an_unfinished_run_opens_without_complaint(started, open_page):
    assert collect(started.path).latest is None
    page = open_page(build_report(started.path))
    for name in PAGES:
        page.goto(f"{started.report.as_uri()}#{name}")
        assert page.locator(f"#{name}").is_visible()
