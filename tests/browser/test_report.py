"""The report as a reader meets it: on a desk, on a phone, in the dark, on paper, by keyboard, read aloud."""

import pytest
from run_maker import make_run

from wlsup.evaluation.report.build import build_report
from wlsup.evaluation.report.render import render
from wlsup.evaluation.report.runs import find_runs, read_runs

pytestmark = pytest.mark.browser

WIDTHS = {"desktop": 1280, "phone": 390}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for approach in ("film", "cross_modal_reprogramming", "lit"):
        for seed in range(3):
            make_run(root, approach, seed, events=seed == 0)
    file = root / "report.html"
    file.write_text(render(build_report(read_runs(find_runs([root])[0])[0]), version="0", created="today"))
    return file


@pytest.fixture(params=[(size, scheme) for size in WIDTHS for scheme in ("light", "dark")], ids="-".join)
def opened(request, browser, page_file):
    size, scheme = request.param
    context = browser.new_context(viewport={"width": WIDTHS[size], "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(page_file.as_uri())
    yield page
    context.close()


def test_no_error_no_request_everything_visible_and_nothing_wider_than_the_page(opened, page_file):
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith(("data:", page_file.as_uri()))] == []
    boxes = opened.evaluate(
        """[...document.querySelectorAll('svg, img')].map(e => {
            const b = e.getBoundingClientRect();
            return [e.tagName, b.width, b.height, b.left, e.complete !== false && (e.naturalWidth ?? 1)]
        })"""
    )
    assert len(boxes) > 20
    assert all(width > 20 and height > 20 and loaded for _, width, height, _, loaded in boxes), boxes
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    sizes = opened.evaluate(
        """[...document.querySelectorAll('svg text')].map(t => {
            const s = t.ownerSVGElement, scale = s.clientWidth / s.viewBox.baseVal.width;
            return parseFloat(getComputedStyle(t).fontSize) * scale
        })"""
    )
    assert min(sizes) >= 7.9  # pixels on the screen


def test_axe_finds_nothing(opened):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe: pip install '.[test]'").Axe()
    # axe evaluates its script in the page, as a debugger does, past the page's own policy
    results = axe.run(opened)
    assert results.violations_count == 0, results.generate_report()


def test_tab_reaches_everything_that_can_be_used_and_shows_where_it_is(browser, page_file):
    page = browser.new_page()
    page.goto(page_file.as_uri())
    count = page.evaluate("document.querySelectorAll('a[href], summary, [tabindex=\"0\"]').length")
    hidden = page.evaluate("document.querySelectorAll('details:not([open]) [tabindex=\"0\"]').length")
    seen = set()
    for _ in range(count + 5):
        page.keyboard.press("Tab")
        place, outline = page.evaluate(
            """(() => { const e = document.activeElement, all = [...document.querySelectorAll('*')];
                const s = getComputedStyle(e); return [all.indexOf(e), s.outlineStyle + ' ' + s.outlineWidth]; })()"""
        )
        tag = page.evaluate("document.activeElement.tagName")
        if tag == "BODY":
            break
        assert outline == "solid 3px", tag
        seen.add(place)
    assert len(seen) == count - hidden
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"  # the first stop
    page.close()


def test_a_figures_values_open_by_keyboard(browser, page_file):
    page = browser.new_page()
    page.goto(page_file.as_uri())
    table = page.locator("figure details table").first
    assert not table.is_visible()
    page.locator("figure summary").first.focus()
    page.keyboard.press("Enter")
    assert table.is_visible()
    page.close()


def test_it_prints_in_light_colours_with_every_figure(browser, page_file):
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(page_file.as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 20)")
    assert page.locator("nav").is_hidden()
    assert page.pdf().startswith(b"%PDF")
    page.set_viewport_size({"width": 688, "height": 1000})  # A4 between its margins
    edges = page.evaluate("[...document.querySelectorAll('table')].map(t => t.getBoundingClientRect().right)")
    assert max(edges) <= 688 + 1, edges
    commands = page.get_by_text("git checkout").first
    assert commands.is_visible()
    context.close()
