"""The run report: its numbers are those of the runs' files."""

import html
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from sdpo_jax.config import TrainConfig
from sdpo_jax.config.resolved import to_toml
from sdpo_jax.errors import UserError
from sdpo_jax.objectives import GrpoConfig, SdpoConfig, SftConfig
from sdpo_jax.reports.panels import FRAME, Series, panel, rolling_mean, thinned
from sdpo_jax.reports.run_report import (
    generations,
    minutes,
    points,
    read_run,
    report_page,
    write_report,
)
from sdpo_jax.run.recipes import default_config

SDPO = default_config(objective=SdpoConfig(), train=TrainConfig(steps=4))


def make_run(folder, config=SDPO, steps=4, complete=True, accuracies=(0.1, 0.5), extra=None):
    """A run's files; evaluated before training and after the last step."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(config))
    rows = [{"kind": "eval", "step": 0, "accuracy": accuracies[0], "teacher_accuracy": 0.7}]
    for step in range(1, steps + 1):
        row = {"kind": "train", "step": step, "loss": 1.0 / step, "success": 0.2 * step}
        row |= {"seconds_rollout": 30.0, "seconds_grade": 10.0, "seconds_train": 6.0 * step}
        if not isinstance(config.objective, SftConfig):
            row["generations"] = 128 * step
        rows.append(row | (extra or {}))
    rows.append({"kind": "eval", "step": steps, "accuracy": accuracies[1]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if complete:
        (folder / "summary.json").write_text(json.dumps({"steps": steps}))
    return folder


def report(*folders):
    return report_page([read_run(folder) for folder in folders], folders[0])


def figures(text):
    """The panels by their titles, as XML."""
    found = re.findall(
        r'<figure class="panel"><figcaption>(.*?)</figcaption>\n(<svg.*?</svg>)', text, re.S
    )
    return {title: ElementTree.fromstring(svg) for title, svg in found}


def cells(text, first):
    """Of the table row that begins so, without markup."""
    for row in re.findall(r"<tr>(.*?)</tr>", text):
        values = [
            re.sub(r"<[^>]*>", "", x).strip() for x in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row)
        ]
        if values[0] == first:
            return values
    raise AssertionError(f"no row {first!r}")


def test_minutes_are_the_phases_of_all_steps_so_far_and_grading_lies_inside_the_rollout(tmp_path):
    run = read_run(make_run(tmp_path / "a"))
    expected = {0: 0.0, 1: 36, 2: 78, 3: 126, 4: 180}
    assert {k: round(60 * v, 6) for k, v in minutes(run).items()} == expected


def test_an_evaluation_stands_at_the_generations_of_its_step(tmp_path):
    run = read_run(make_run(tmp_path / "a"))
    assert points(run.evaluations, "accuracy", generations(run)) == [(0.0, 0.1), (512.0, 0.5)]


def test_the_accuracy_panel_has_a_line_of_each_run_and_of_its_teacher(tmp_path):
    folders = [
        make_run(tmp_path / name, accuracies=(0.1, end)) for name, end in (("a", 0.5), ("b", 0.9))
    ]
    root = figures(report(*folders))["Accuracy against generations"]
    lines = {line.get("class"): line.get("points") for line in root.iter("polyline")}
    assert set(lines) == {"run0", "run0 dashed", "run1", "run1 dashed"}
    heights = {name: [float(p.split(",")[1]) for p in str(lines[name]).split()] for name in lines}
    assert heights["run0"][0] == heights["run1"][0]
    # 0.1 to 0.5 is half of 0.1 to 0.9, upwards.
    rise = {name: heights[name][0] - heights[name][-1] for name in ("run0", "run1")}
    assert rise["run1"] == pytest.approx(2 * rise["run0"], abs=0.15)
    assert rise["run0"] > 0
    told = [title.text for title in root.iter("title")]
    assert f"{folders[1]}, student: 90.0 % at 512" in told


def test_before_and_after_are_the_first_and_the_last_evaluation(tmp_path):
    text = report(make_run(tmp_path / "a"))
    assert cells(text, "accuracy") == ["accuracy", "10.0 %", "50.0 %"]
    assert cells(text, "teacher_accuracy") == ["teacher_accuracy", "70.0 %", "-"]


def test_phases_are_medians_so_that_a_step_that_compiled_does_not_count(tmp_path):
    folder = make_run(tmp_path / "a", steps=5)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[1]["seconds_train"] = 1e6
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    times = report(folder).split("time goes</h2>")[1]
    assert cells(times, str(folder))[1:4] == ["30.00 s", "24.00 s", "54.00 s"]


def test_only_settings_that_differ_are_compared(tmp_path):
    other = replace(SDPO, seed=5, run_dir="elsewhere")
    text = report(make_run(tmp_path / "a"), make_run(tmp_path / "b", other))
    assert cells(text, "seed") == ["seed", "0", "5"]
    assert "<code>run_dir" not in text
    assert "<code>train.steps" not in text
    same = report(make_run(tmp_path / "c"), make_run(tmp_path / "d"))
    assert "The recipes agree" in same


@pytest.mark.parametrize("objective", [GrpoConfig(), SftConfig()])
def test_other_objectives_have_a_report_of_what_they_measure(tmp_path, objective):
    text = report(make_run(tmp_path / "a", replace(SDPO, objective=objective)))
    titles = figures(text)
    assert ("Accuracy against generations" in titles) == (objective.name == "grpo")
    assert {"Accuracy against minutes of training", "Loss"} <= set(titles)
    assert "Divergence of student and teacher (JSD)" not in titles
    task = {"grpo": "grpo on tool_calls", "sft": "sft on tool_call_corpus"}[objective.name]
    assert f"<td>{task}</td>" in text


def test_a_run_that_still_trains_has_a_report(tmp_path):
    folder = make_run(tmp_path / "a", steps=2, complete=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # being written
    assert cells(report(folder), str(folder))[3:7] == [
        "2 of 4",
        "256",
        "1 min 18 s",
        "not complete",
    ]


def test_a_run_that_was_only_evaluated_has_a_report(tmp_path):
    folder = make_run(tmp_path / "a", steps=0, complete=False)
    assert "no step yet" in report(folder)


def test_values_that_were_not_finite_are_left_out(tmp_path):
    folder = make_run(tmp_path / "a", extra={"loss": None, "grad_norm": None})
    assert "Loss" not in figures(report(folder))


def test_names_of_runs_are_text(tmp_path):
    folder = make_run(tmp_path / "<b onclick=x>&amp;")
    text = report(folder)
    assert "<b onclick" not in text
    title = re.search("<title>(.*?)</title>", text)
    heading = re.search('<p class="soft">(.*?)</p>', text)
    assert title and title.group(1) == f"Run report: {html.escape(str(folder))}"
    assert heading and heading.group(1) == html.escape(str(folder))


def test_a_link_to_a_folder_with_signs_of_its_own_leads_there(tmp_path):
    folder = make_run(tmp_path / "a#1 50%")
    (folder / "heatmap.html").write_text("x")
    assert 'href="a%231%2050%25/heatmap.html"' in report_page([read_run(folder)], tmp_path)


def test_the_heat_map_is_linked_where_it_is(tmp_path):
    folder = make_run(tmp_path / "a")
    assert "sdpo heatmap" in report(folder)
    (folder / "heatmap.html").write_text("x")
    run = read_run(folder)
    assert 'href="heatmap.html"' in report_page([run], folder)
    assert 'href="a/heatmap.html"' in report_page([run], tmp_path)


# The command


def test_the_report_lies_in_the_runs_folder_or_where_it_is_wanted(tmp_path, capsys):
    one, two = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    for folders, path in (
        ([one], one / "report.html"),
        ([one, two], one / "comparison.html"),
        ([two], tmp_path / "x.html"),
    ):
        write_report(folders, path if path.name == "x.html" else None)
        assert path.read_text().startswith("<!doctype html>")
        assert f"wrote {path}: " in capsys.readouterr().out
    assert not (two / "report.html").exists()


def test_folders_without_a_run_or_without_rows_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"expected the folder of a run, with config\.toml in it"):
        write_report([tmp_path])
    folder = make_run(tmp_path / "a")
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="no row yet"):
        write_report([folder])
    with pytest.raises(UserError, match="there is no folder"):
        write_report([make_run(tmp_path / "b")], tmp_path / "none" / "x.html")
    with pytest.raises(UserError, match="expected the name of a file with"):
        write_report([folder], tmp_path / "x.svg")
    with pytest.raises(UserError, match="different runs, at most 6"):
        write_report([folder, folder])


# Panels


def test_a_rolling_mean_looks_back_only():
    assert rolling_mean([(1, 1.0), (2, 3.0), (3, 8.0)], 2) == [(1, 1.0), (2, 2.0), (3, 5.5)]


@pytest.mark.parametrize("count", [1, 199, 200, 201, 5000])
def test_a_thinned_line_keeps_its_end_and_its_mean(count):
    line = [(float(i), float(i % 7)) for i in range(count)]
    thin = thinned(line)
    assert len(thin) <= 200
    assert thin[-1][0] == line[-1][0]
    if count % len(thin) == 0:  # equal groups
        assert sum(y for _, y in thin) / len(thin) == pytest.approx(sum(y for _, y in line) / count)
    if count <= 200:
        assert thin == line


@pytest.mark.parametrize("values", [(0.0, 0.0), (5.0, 5.0), (-3.0, 2.0), (1e-7, 2e-7), (0.4, 99.0)])
def test_every_point_lies_inside_its_panel(values):
    series = [Series("a", list(enumerate(values)), 0)]
    root = ElementTree.fromstring(
        panel("t", series, x_label="x").split("\n", 1)[1].replace("</figure>", "")
    )
    for circle in root.iter("circle"):
        assert 0 <= float(circle.get("cx")) <= FRAME.width
        assert 0 <= float(circle.get("cy")) <= FRAME.height


def test_a_panel_without_points_is_not_drawn():
    assert panel("t", [Series("a", [], 0)], x_label="x") == ""
