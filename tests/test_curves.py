"""Learning curves: the picture's points are the data's."""

import json
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from sdpo_jax.errors import UserError
from sdpo_jax.reports.curves import (
    FRAME,
    NAME_HEIGHT,
    Curve,
    Point,
    axes_for,
    draw,
    evaluations,
    main,
    merge,
    read_curve,
)
from sdpo_jax.reports.plot import nice_ticks

SVG = "{http://www.w3.org/2000/svg}"


def rows(values, per_step=8, every=2):
    """A run that is evaluated before training and every second step."""
    out = [{"kind": "eval", "step": 0, "accuracy": values[0]}]
    for step in range(1, every * (len(values) - 1) + 1):
        out.append({"kind": "train", "step": step, "generations": per_step * step})
        if step % every == 0:
            out.append({"kind": "eval", "step": step, "accuracy": values[step // every]})
    return out


def write(path, values, **shape):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(values, **shape)))
    return str(path)


def places(text):
    return [tuple(map(float, pair.split(","))) for pair in text.split()]


def test_an_evaluation_stands_at_the_generations_of_its_step():
    assert evaluations(rows([0.1, 0.2, 0.4]), "accuracy") == {0: 0.1, 16: 0.2, 32: 0.4}


def test_a_value_that_was_not_finite_is_left_out():
    assert evaluations(rows([0.1, None, 0.4]), "accuracy") == {0: 0.1, 32: 0.4}


def test_seeds_merge_where_all_have_a_value():
    curve = merge("a", [{0: 0.0, 16: 0.25, 32: 0.5}, {0: 0.5, 16: 0.75}])
    assert curve.points == [Point(0, 0.25, 0.0, 0.5), Point(16, 0.5, 0.25, 0.75)]
    assert curve.seeds == 2


def test_points_of_the_picture_are_those_of_the_data():
    seeds = [{0: 0.0, 16: 0.2, 32: 0.6}, {0: 0.2, 16: 0.4, 32: 1.0}]
    curves = [merge("a & b", seeds), merge("c", [{0: 0.5, 32: 0.5}])]
    x, y = axes_for(curves)
    root = ElementTree.fromstring(draw(curves, "accuracy"))
    first, second = root.iter(f"{SVG}polyline")
    for line, curve in ((first, curves[0]), (second, curves[1])):
        expected = [(x.place(p.generations), y.place(p.mean)) for p in curve.points]
        assert places(line.get("points")) == [pytest.approx(e, abs=0.06) for e in expected]
    (band,) = root.iter(f"{SVG}polygon")  # one seed has no band
    there = [(x.place(p.generations), y.place(p.high)) for p in curves[0].points]
    back = [(x.place(p.generations), y.place(p.low)) for p in curves[0].points][::-1]
    assert places(band.get("points")) == [pytest.approx(e, abs=0.06) for e in there + back]
    assert {"a & b", "c", "100 %", "generations"} <= {e.text for e in root.iter(f"{SVG}text")}


def test_an_axis_is_linear_and_grows_upwards():
    _, y = axes_for([merge("a", [{0: 0.0, 16: 1.0}])])
    assert (y.low, y.high) == (0.0, 1.0)
    assert y.place(0.5) == (y.place(0.0) + y.place(1.0)) / 2
    assert y.place(1.0) < y.place(0.0)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 0.78, [0, 0.2, 0.4, 0.6, 0.8]),
        (-0.3, 0.7, [-0.4, -0.2, 0, 0.2, 0.4, 0.6, 0.8]),
        (0, 0, [0, 1]),
    ],
)
def test_ticks_are_round_and_cover_the_data(low, high, expected):
    assert nice_ticks(low, high, 5) == pytest.approx(expected)


def test_both_modes_colour_every_curve():
    text = draw([merge(name, [{0: 0.0, 8: 1.0}]) for name in "abcd"], "accuracy")
    light, dark = text.split("@media(prefers-color-scheme:dark)")
    assert all(f".line{i}{{stroke:" in part for i in range(4) for part in (light, dark))


def test_the_command_writes_the_picture(tmp_path, capsys):
    one, two = write(tmp_path / "1", [0.1, 0.5]), write(tmp_path / "2", [0.3, 0.9])
    out = tmp_path / "out.svg"
    main([str(out), "--metric", "accuracy", f"A={one},{two}", f"B={one}"])
    assert out.read_text().startswith("<svg ")
    assert "A (2 run(s)), B (1 run(s))" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [[], ["out.svg"], ["out.png", "A=x"], ["out.svg", "x"], ["out.svg", "A=x", "--metric"]]
)
def test_arguments_that_do_not_fit_print_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2 and "usage: python -m sdpo_jax" in capsys.readouterr().err


def test_a_file_without_the_metric_says_what_it_has(tmp_path):
    file = write(tmp_path / "1", [0.1, 0.5])
    with pytest.raises(UserError, match="expected evaluations with 'reward', found accuracy, kind"):
        read_curve("A", [file], "reward")
    with pytest.raises(UserError, match="no such file"):
        read_curve("A", [f"{file}.missing"], "accuracy")


def test_runs_that_share_no_generations_are_refused(tmp_path):
    file = write(tmp_path / "1", [None, 0.5])
    other = write(tmp_path / "2", [None, 0.5], per_step=3)
    with pytest.raises(UserError, match="no evaluation at equal generations"):
        read_curve("A", [file, other], "accuracy")


def test_the_horizontal_axis_says_what_it_counts():
    curves = [merge("a", [{0: 0.0, 8: 1.0}])]
    plain, steps = draw(curves, "accuracy"), draw(curves, "accuracy", across="steps")
    assert steps == plain.replace("generations", "steps") != plain


def test_names_of_lines_that_end_together_stay_apart_and_above_the_axis():
    ends = {"high": 0.9, "low": 0.01, "lower": 0.0, "lowest": 0.0}
    curves = [Curve(n, [Point(0, 1.0, 1.0, 1.0), Point(9, y, y, y)], 1) for n, y in ends.items()]
    texts = [
        t for t in ElementTree.fromstring(draw(curves, "accuracy")) if "name" in t.get("class", "")
    ]
    heights = [float(text.get("y", "")) for text in texts]
    assert [text.text for text in texts] == list(ends)
    assert all(b - a >= NAME_HEIGHT for a, b in pairwise(heights))
    assert heights[-1] == FRAME.height - FRAME.bottom and heights[0] < 100
