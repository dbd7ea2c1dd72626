"""The heat-map's file: small, closed to the outside, and deaf to what a model writes."""

import base64
import hashlib
import json
import math
from html.parser import HTMLParser

import batch_rows
import pytest

from sdpo_jax.reports.heatmap import heatmap_page, scale
from sdpo_jax.reports.page import embedded_json, page, write_page

HOSTILE = (
    "</script><script>window.attacked = 1</script>",
    "<img src=x onerror='window.attacked = 1'>",
    '"><svg onload="window.attacked = 1">',
    "<!-- ]]> &lt; &amp; {{ }} ${window.attacked = 1} `",
    "line\u2028separator\u2029paragraph \u202ereversed\u202c \ud800 \x00 \x1b[31m",
)


class Elements(HTMLParser):
    """What a browser would build: elements with attributes, and the text of scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self._open = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
            self._open = True

    def handle_endtag(self, tag):
        self._open = self._open and tag != "script"

    def handle_data(self, data):
        if self._open:
            self.scripts[-1] += data


def embedded(text):
    return json.loads(Elements(text).scripts[0])


def hostile_batch():
    rows = [
        batch_rows.response(
            i,
            [batch_rows.token(text, 0.5, 0.25, [(text, 0.5, 0.25)])],
            shown=(text, text),
            prompt_id=text,
            prompt=[{"role": text, "content": text}],
            feedback=text,
            teacher_prompt=text,
        )
        for i, text in enumerate(HOSTILE)
    ]
    head, *rows = batch_rows.batch(*rows)
    return [head | {"run": HOSTILE[0]}, *rows]


def test_what_a_model_writes_makes_no_element_and_no_script():
    harmless, hostile = (
        Elements(heatmap_page(rows)) for rows in (batch_rows.example(), hostile_batch())
    )
    assert hostile.elements == harmless.elements
    assert len(hostile.scripts) == 2
    assert hostile.scripts[1] == harmless.scripts[1]


def test_what_a_model_writes_arrives_unchanged():
    data = embedded(heatmap_page(hostile_batch()))
    assert set(HOSTILE) <= set(data["texts"])
    assert [data["long"][row["demo"]] for row in data["rows"]] == list(HOSTILE)


@pytest.mark.parametrize("text", HOSTILE)
def test_embedded_json_is_ascii_without_markup_and_says_the_same(text):
    written = embedded_json([text])
    assert written.isascii()
    assert not set(written) & set("<>&")
    assert json.loads(written) == [text]


def test_the_page_may_run_its_own_script_and_ask_for_nothing():
    elements = Elements(heatmap_page(batch_rows.example()))
    (policy,) = [
        a["content"] for tag, a in elements.elements if tag == "meta" and "http-equiv" in a
    ]
    digest = base64.b64encode(hashlib.sha256(elements.scripts[1].encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'sha256-{digest}'" in policy
    attributes = {name for _, attributes in elements.elements for name in attributes}
    assert not attributes & {"src", "href", "srcset", "action"}
    assert not [name for name in attributes if name.startswith("on")]
    assert "://" not in heatmap_page(batch_rows.example())


def test_sixty_four_responses_of_sixty_four_tokens_stay_below_two_megabytes():
    text = heatmap_page(batch_rows.realistic())
    assert sum(len(row["w"]) for row in embedded(text)["rows"]) == 64 * 64
    assert 200_000 < len(text.encode()) < 2_000_000


def test_numbers_on_the_page_are_those_of_the_rows():
    rows = batch_rows.realistic(responses=2, tokens=5)
    data = embedded(heatmap_page(rows))
    for row, shown in zip(rows[1:], data["rows"], strict=True):
        assert shown["grpo"] == row["grpo_advantage"]
        for i, token in enumerate(row["tokens"]):
            advantage = (shown["q"][i] - shown["p"][i]) / 1000
            assert advantage == pytest.approx(token["advantage"], abs=1.1e-3)
            assert data["texts"][shown["w"][i]] == token["text"]
            flat = shown["c"][i]
            told = {data["texts"][flat[k]]: flat[k + 1 : k + 3] for k in range(0, len(flat), 3)}
            for other in token["alternatives"]:
                p, q = math.exp(other["log_p"]), math.exp(other["log_q"])
                if max(p, q) < 4e-4:
                    assert other["text"] not in told
                elif max(p, q) > 6e-4:
                    assert told[other["text"]] == pytest.approx([1e4 * p, 1e4 * q], abs=0.51)


def test_a_long_response_is_cut_on_the_page_and_says_how_long_it_was():
    tokens = [batch_rows.token("a", 0.5, 0.25)] * 30
    rows = batch_rows.batch(batch_rows.response(0, tokens, shown=("b", None)))
    (row,) = embedded(heatmap_page(rows, max_tokens=8))["rows"]
    assert (len(row["w"]), len(row["q"]), row["total"]) == (8, 8, 30)


def test_control_tokens_are_told_apart_from_text_that_looks_like_them():
    tokens = [
        batch_rows.token("end", 0.5, 0.5),
        batch_rows.token("", 0.5, 0.5, number=9),
        batch_rows.token("", 0.5, 0.5, number=batch_rows.STOP),
    ]
    data = embedded(heatmap_page(batch_rows.batch(batch_rows.response(0, tokens, shown=("b", "")))))
    assert [data["texts"][w] for w in data["rows"][0]["w"]] == ["end", ["9"], ["end"]]


def advantages(*values):
    return [{"tokens": [{"advantage": value} for value in values]}]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], [-1, 1]),
        ([None, None], [-1, 1]),
        ([0.1, -0.2], [-1, 1]),  # noise is not stretched to full colour
        ([0.0] * 900 + [-7.5] * 50 + [2.2] * 50, [-8, 3]),
        ([-7.5] * 50 + [-400.0], [-8, 1]),  # one token does not bleach the others
    ],
)
def test_the_scale_holds_nine_tenths_of_each_sign(values, expected):
    assert scale(advantages(*values)) == expected


def test_a_page_is_written_whole_and_in_utf_8(tmp_path):
    write_page(tmp_path / "x.html", page("a\ud800 \u2713 <", "", styles=[], scripts=[]))
    assert "<title>a? \u2713 &lt;</title>" in (tmp_path / "x.html").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["x.html"]
