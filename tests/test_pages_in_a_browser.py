"""The pages as a reader has them, in a real browser: colours, keys, and no request.

Skipped where no Chromium is on PATH; `.ci/run` installs one.
"""

import batch_rows
import pytest
from browser import Page, need_browser
from test_heatmap import hostile_batch
from test_run_report import make_run

from sdpo_jax.reports.heatmap import heatmap_page
from sdpo_jax.reports.page import write_page
from sdpo_jax.reports.run_report import write_report

pytestmark = pytest.mark.slow
SCHEMES = ("light", "dark")
MINUS = "\u2212"


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    page = Page(need_browser(), tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture
def heatmap(tab, tmp_path):
    """The example's page, open; afterwards nothing was asked for and nothing went wrong."""
    path = tmp_path / "heatmap.html"
    write_page(path, heatmap_page(batch_rows.example()))
    tab.open(path)
    yield tab
    assert tab.errors == []
    assert tab.requests == [path.resolve().as_uri()]


def rgb(tab, selector, name="backgroundColor"):
    """A computed colour as three numbers."""
    text = tab.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{name}")
    return [int(float(x)) for x in text.removeprefix("rgb(").removesuffix(")").split(",")]


def luminance(colour):
    """Relative, as WCAG 2 defines it."""
    linear = [x / 255 / 12.92 if x <= 10 else ((x / 255 + 0.055) / 1.055) ** 2.4 for x in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, two):
    dark, light = sorted([luminance(one), luminance(two)])
    return (light + 0.05) / (dark + 0.05)


def show(tab, row):
    """Chooses a response by its number, as a reader does: by the picture and the arrow keys."""
    tab.evaluate("document.getElementById('sdpo').focus()")
    for _ in range(9):
        tab.press("ArrowUp")
    for _ in range(row):
        tab.press("ArrowDown")
    assert tab.evaluate("document.getElementById('one-title').textContent").startswith(
        f"Response {row + 1} "
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_token_that_the_teacher_finds_less_likely_is_red_and_one_more_likely_is_blue(
    heatmap, scheme
):
    heatmap.scheme(scheme)
    show(heatmap, 0)
    red, green, blue = rgb(heatmap, "#token-1")
    assert red > green + 60
    assert red > blue + 60
    show(heatmap, 1)
    red, green, blue = rgb(heatmap, "#token-1")
    assert blue > red + 60
    ground, neutral = rgb(heatmap, "#tokens"), rgb(heatmap, "#token-0")
    assert max(abs(a - b) for a, b in zip(ground, neutral, strict=True)) < 25


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_sign_shows_without_colour(heatmap, scheme):
    heatmap.scheme(scheme)
    bars = []
    for row in (0, 1, 3):
        show(heatmap, row)
        bars.append(heatmap.evaluate("document.getElementById('token-1').style.boxShadow"))
    below, above, none = bars
    assert " -4px " in below
    assert " 4px " in above
    assert none == "none"


def test_the_ground_follows_the_system_and_the_button_overrules_it(heatmap):
    light = rgb(heatmap, "body")
    heatmap.scheme("dark")
    dark = rgb(heatmap, "body")
    assert luminance(light) > 0.8 > 0.05 > luminance(dark)
    heatmap.evaluate("document.getElementById('theme').click()")
    assert rgb(heatmap, "body") == light
    heatmap.evaluate("document.getElementById('theme').click()")
    heatmap.scheme("light")
    assert rgb(heatmap, "body") == dark


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_is_readable_on_every_colour_of_the_scale(heatmap, scheme):
    heatmap.scheme(scheme)
    pairs = heatmap.evaluate(
        "Array.from({length: 41}, (_, i) => colour(i / 20 - 1)).map((c) => [c, ink(c)])"
    )
    for ground, text in pairs:
        written = [int(text[i : i + 2], 16) for i in (1, 3, 5)]
        assert contrast(ground, written) >= 4.5, (ground, text)
    for selector in ("#about", "#count", "h1", "#matrix-help"):
        panel = ".controls" if selector == "#count" else "body"
        assert contrast(rgb(heatmap, selector, "color"), rgb(heatmap, panel)) >= 4.5, selector


def test_hovering_a_token_shows_what_teacher_and_student_find_likely_there(heatmap):
    show(heatmap, 0)
    heatmap.hover("#token-0")
    assert "12:30" not in heatmap.evaluate("document.getElementById('token').innerText")
    heatmap.hover("#token-1")
    rows = heatmap.evaluate(
        "Array.from(document.querySelectorAll('#token tbody tr'), (r) => "
        "Array.from(r.cells, (c) => c.innerText.trim()))"
    )
    assert rows == [["90.0 %", "1230", "0.20 %"], ["5.00 %", "12:30", "99.0 %"]]
    text = heatmap.evaluate("document.getElementById('token').innerText")
    assert f"{MINUS}6.11" in text  # log(0.002 / 0.9)
    assert f"{MINUS}0.50" in text
    assert heatmap.evaluate("document.getElementById('feed').innerText") == "time: expected HH:MM"


def test_tokens_are_reached_with_the_keyboard_and_have_names(heatmap):
    show(heatmap, 0)
    heatmap.evaluate("document.querySelector('#tokens [tabindex=\"0\"]').focus()")
    heatmap.press("Home")
    heatmap.press("ArrowRight")
    focused = heatmap.evaluate(
        "[document.activeElement.id, document.activeElement.ariaLabel,"
        " document.activeElement.getAttribute('aria-selected')]"
    )
    assert focused == ["token-1", f"1230, {MINUS}6.11", "true"]
    assert heatmap.evaluate("document.querySelectorAll('#tokens [tabindex=\"0\"]').length") == 1
    heatmap.press("ArrowDown")
    assert heatmap.evaluate("document.activeElement.ariaLabel").startswith("noon")
    unnamed = heatmap.evaluate(
        "Array.from(document.querySelectorAll('button, select, input')).filter((e) => "
        "!(e.labels && e.labels.length) && !e.ariaLabel && !e.textContent.trim()).length"
    )
    assert unnamed == 0


def test_a_place_in_the_picture_is_read_out(heatmap):
    show(heatmap, 0)
    heatmap.press("ArrowRight")
    told = heatmap.evaluate("document.querySelector('#say[role=status]').textContent")
    assert told in (
        f"Response 1, failed, token {i}: {t}"
        for i, t in ((2, f"1230, {MINUS}6.11"), (3, "\u27e8end\u27e9, 0.00"))
    )


def test_filters_and_sorting_change_what_is_shown(heatmap):
    def chosen(box, value):
        heatmap.evaluate(
            f"(() => {{ const e = document.getElementById('{box}'); e.value = '{value}';"
            "e.dispatchEvent(new Event('change')); })()"
        )
        return heatmap.evaluate("state.rows.map((row) => row.n)")

    assert chosen("by-verdict", "passed") == [1, 3]
    assert chosen("by-verdict", "") == [0, 1, 2, 3]
    assert chosen("by-context", "none") == [2]
    assert chosen("by-context", "demo") == [1, 3]
    assert chosen("by-context", "") == [0, 1, 2, 3]
    assert chosen("sort", "most") == [1, 0, 3, 2]
    assert chosen("sort", "least") == [0, 1, 3, 2]
    assert "4 of 4" in heatmap.evaluate("document.getElementById('count').textContent")


def test_the_picture_of_the_batch_has_the_colours_of_its_tokens(heatmap):
    show(heatmap, 3)  # the mark is then on another row
    pixels = heatmap.evaluate(
        "(() => { const m = matrices[0], c = m.canvas, r = c.width / c.clientWidth;"
        "const all = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "const at = (y, i) => { const x = Math.round((GUTTER + (i + .5) * m.cell) * r);"
        "const line = Math.round((y + .5) * m.height * r) - 1;"
        "return Array.from(all.slice(4 * (line * c.width + x), 4 * (line * c.width + x) + 3)); };"
        "return [at(0, 1), at(1, 1), at(0, 0)]; })()"
    )
    red, blue, neutral = pixels
    show(heatmap, 0)
    assert red == rgb(heatmap, "#token-1")
    assert neutral == rgb(heatmap, "#token-0")
    show(heatmap, 1)
    assert blue == rgb(heatmap, "#token-1")


def test_a_token_of_a_long_response_is_scrolled_into_view_and_the_page_stays(tab, tmp_path):
    write_page(tmp_path / "x.html", heatmap_page(batch_rows.realistic(responses=2, tokens=400)))
    tab.open(tmp_path / "x.html")
    tab.evaluate("document.getElementById('sdpo').focus()")
    for key, index in (("End", 399), ("Home", 0)):
        tab.press(key)
        inside = tab.evaluate(
            "(() => { const box = document.getElementById('tokens').getBoundingClientRect();"
            f"const token = document.getElementById('token-{index}').getBoundingClientRect();"
            "return token.top >= box.top && token.bottom <= box.bottom && scrollY === 0; })()"
        )
        assert inside, key
    assert tab.errors == []


def test_a_picture_without_room_is_drawn_when_there_is_some(heatmap):
    for shown in ("none", ""):
        heatmap.evaluate(
            f"document.querySelector('main').style.display = '{shown}';"
            "window.dispatchEvent(new Event('resize'))"
        )
    assert heatmap.evaluate("document.getElementById('sdpo').width") > 100


def test_what_a_model_writes_is_shown_and_does_nothing(tab, tmp_path):
    path = tmp_path / "hostile.html"
    write_page(path, heatmap_page(hostile_batch()))
    tab.open(path)
    for row in range(5):
        show(tab, row)
    assert tab.evaluate("window.attacked") is None
    assert tab.evaluate("document.querySelectorAll('main img, main svg, main script').length") == 0
    show(tab, 0)
    assert "</script>" in tab.evaluate("document.getElementById('tokens').innerText")
    assert tab.errors == []
    assert tab.requests == [path.resolve().as_uri()]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_report_draws_and_asks_for_nothing(tab, tmp_path, scheme):
    folder = make_run(tmp_path / "a")
    write_report([folder])
    path = folder / "report.html"
    tab.open(path, scheme=scheme)
    box = tab.evaluate(
        "(() => { const b = document.querySelector('polyline').getBoundingClientRect();"
        "return [b.width, b.height]; })()"
    )
    assert min(box) > 20
    assert contrast(rgb(tab, ".panel text", "fill"), rgb(tab, ".panel")) >= 4.5
    assert contrast(rgb(tab, "polyline", "stroke"), rgb(tab, ".panel")) >= 3
    assert tab.errors == []
    assert tab.requests == [path.resolve().as_uri()]


@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_is_wider_than_the_window(tab, tmp_path, width):
    write_page(tmp_path / "x.html", heatmap_page(batch_rows.example()))
    tab.open(tmp_path / "x.html", width=width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
