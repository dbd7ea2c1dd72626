"""Writes the README's table of claims and `docs/claims.md` from `docs/claims/*.json`.

    python benchmarks/claims/table.py            # writes both
    python benchmarks/claims/table.py --check    # fails if they differ from the results

The table stands in the README between two comments; nobody edits it or the page by hand.
"""

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS, README, PAGE = Path("docs/claims"), Path("README.md"), Path("docs/claims.md")
SCRIPTS = Path("benchmarks/claims")
BEGIN, END = "<!-- claims: begin -->", "<!-- claims: end -->"
_NUMBER = r"(-?\d[\d.]*(?:e[-+]?\d+)?)"
_INTERVAL = rf"{_NUMBER} \[{_NUMBER}, {_NUMBER}\]"


class Found(NamedTuple):
    """The results that one claim is judged by."""

    tables: dict[str, Mapping[str, Mapping[str, Any]]]
    """Measures by arm."""
    because: str
    """Every verdict's reason."""

    def cell(self, arm: str, measure: str) -> float:
        """Mean of a measure over the seeds."""
        return self.tables[arm][measure]["mean"]

    def said(self, what: str) -> tuple[float, float, float]:
        """A number of the reasons by the words before it: mean, and ends of its interval."""
        match = re.search(re.escape(what) + r":? " + _INTERVAL, self.because)
        if match is None:
            raise SystemExit(f"expected an interval after {what!r} in {self.because!r}")
        mean, low, high = map(float, match.groups())
        return mean, low, high

    def differences(self) -> list[float]:
        """Every number of the reasons that has an interval."""
        return [float(match[0]) for match in re.findall(_INTERVAL, self.because)]


def _points(value: float) -> str:
    digits = 0 if abs(value) >= 0.1 else 1
    return f"{100 * value:+.{digits}f} points".replace("-", "\u2212")


def _doubt(interval: tuple[float, float, float]) -> str:
    return " (interval includes 0)" if interval[1] <= 0.0 <= interval[2] else ""


def _generations(found: Found) -> str:
    share = found.said("share of GRPO's generations")[0]
    return f"{100 * share:.0f} % of GRPO's generations"


def _without_feedback(found: Found) -> str:
    gain = found.said("siblings only - GRPO")
    return f"{_points(gain[0])} over GRPO{_doubt(gain)}"


def _length(found: Found) -> str:
    gain = found.said("GRPO's tokens - SDPO's, at GRPO's accuracy")
    direction = "shorter" if gain[0] >= 0 else "longer"
    return f"{abs(gain[0]):.1f} tokens {direction}{_doubt(gain)}"


def _attempts(found: Found) -> str:
    parts: list[str] = []
    pattern = r"after (\d+) generations of SDPO, (\d+) of ([^;]+)"
    for ours, theirs, other in re.findall(pattern, found.because):
        ratio = int(ours) / int(theirs)
        much = f"{100 * ratio:.2g} % of" if ratio <= 1 else f"{ratio:.0f} x"
        parts.append(f"{much} the attempts of {other}")
    return ", ".join(parts)


def _initial_teacher(found: Found) -> str:
    gain = found.said("student's last - teacher's first")[0]
    return f"{_points(gain)} over the initial teacher"


def _growth(found: Found) -> str:
    sizes = list(dict.fromkeys(arm.rpartition(" ")[2] for arm in found.tables))
    small, large = sizes[0], sizes[-1]
    leads = [
        found.cell(f"SDPO {size}", "accuracy") - found.cell(f"GRPO {size}", "accuracy")
        for size in (small, large)
    ]
    growth = _points(leads[1] - leads[0])[1:]
    return f"lead over GRPO grows by {growth} from {small} to {large} parameters"


def _credit(found: Found) -> str:
    gains = found.differences()
    return f"at least {_points(min(gains))} in each of {len(gains)} comparisons"


def _collapsed(found: Found) -> str:
    runs = [found.tables[arm]["collapsed"]["values"] for arm in ("EMA 0.05 (default)", "live")]
    default, live = (f"{sum(values):.0f} of {len(values)}" for values in runs)
    return f"{default} default runs collapse, {live} with a live teacher"


def _forgotten(found: Found) -> str:
    gains = [
        found.cell(f"SFT{hand}", "forgotten") - found.cell(f"SDFT{hand}", "forgotten")
        for hand in (", another hand", "")
    ]
    much = [f"{abs(100 * x):.0f} points {'less' if x >= 0 else 'more'}" for x in gains]
    return f"forgets {much[0]} with another hand's demonstrations, {much[1]} with the model's own"


def _information(found: Found) -> str:
    return f"{_points(found.said('SDPO - shuffled context')[0])} over a shuffled context"


def _step_time(found: Found) -> str:
    ratio = found.cell("setting C", "ratio")
    return f"{ratio:.2f} x GRPO's step time ({'slower' if ratio > 1 else 'faster'})"


CLAIMS: dict[int, tuple[str, Callable[[Found], str]]] = {
    1: ("GRPO's accuracy with a quarter of the generations, at sparse rewards", _generations),
    2: ("without rich feedback, at least GRPO's accuracy", _without_feedback),
    3: ("shorter responses than GRPO's at equal accuracy", _length),
    4: (
        "one hard question, before any reward: half the attempts of best-of-k and of asking in "
        "turns",
        _attempts,
    ),
    5: ("the teacher improves, and the student ends above the initial teacher", _initial_teacher),
    6: ("larger models gain more over GRPO", _growth),
    7: ("finer credit is no worse, nor are solution and feedback together", _credit),
    8: ("long runs collapse with a live teacher, not with the default one", _collapsed),
    9: ("SDFT learns a new task as well as SFT and forgets less", _forgotten),
    10: ("the gain is information, not style", _information),
    11: ("a step takes about as long as GRPO's", _step_time),
}
"""What the papers claim, in the order of the table, and the number that shows it best."""
ABOUT = """\
Written by `benchmarks/claims/table.py` from `docs/claims/*.json`; the [README](../README.md) has
the table of all claims. All models here have a million parameters or fewer, and all requests are
generated: a result may be different for a large model.

A value is the mean over seeds with its 95 % interval (Student's t), which estimates what other
seeds would give. The interval is not bounded, so that of a share may reach below 0 or above 1.
Differences are taken seed by seed. "Ahead" holds if the whole interval of each difference is above
0; "no worse" holds unless an interval lies wholly below 0. Where a claim names a number, the worse
end of the interval has to reach it. Machine: 2 CPU cores, two runs at a time on one core each."""

TERMS = {
    "Points": "percentage points of held-out accuracy.",
    "Generation, attempt": "one sampled response.",
    "Rich feedback": "text of the environment about what is wrong with a failed attempt.",
    "Siblings": "the other attempts at the same question in the same step.",
    "Solution": "an attempt that passed, shown to the teacher (a demonstration).",
    "Initial teacher": "the start model, shown a solution or feedback.",
    "Best-of-k": "independent samples of the start model, without training.",
    "Asking in turns": "no training: the start model is asked again and again, and its prompt "
    "holds the feedback on all earlier attempts.",
    "discovery@k": "the probability that one of the first k attempts at a question passes.",
    "Logit credit": "the divergence compares student and teacher on every token of the vocabulary "
    "at each position (SDPO's default).",
    "Token credit": "only the sampled token is compared: its log q / p is its advantage.",
    "Sequence credit": "all tokens of a response share the mean of those advantages.",
    "Fixed negative": "a control without a teacher: an advantage of -1 on unlikely tokens of "
    "failures, 0 elsewhere.",
    "Shuffled context": "a control: the teacher is shown the context of another question.",
    "Default teacher": "an exponential moving average (EMA) of the student with rate 0.05.",
    "Live, frozen teacher": "the student's current weights; the start model's.",
    "Gated refresh": "a frozen teacher that the student replaces only once its training reward is "
    "higher and its responses are no longer than at the last replacement.",
    "Failures alone": "only failed attempts are distilled, the others go to GRPO (SRPO).",
    "Collapsed": "a run that ends below half of its best accuracy.",
    "The model's own hand": "demonstrations in exactly the form in which the start model writes "
    "calls itself.",
    "Another hand": "the same calls after a line of talk, which the start model never writes.",
    "Learned, forgotten": "accuracy on a task right after training on it; how far it has fallen "
    "from its best since then when all tasks are done.",
    "Setting A, C": "responses of 64 and of 256 tokens.",
}
"""Terms of tables and verdicts."""

RUNS = "The runs of the tables took {} in all, without the searches for learning rates and models."


def read_results(folder: Path, scripts: Path = SCRIPTS) -> list[dict[str, Any]]:
    """The records of all scripts, ordered by claim; what they are about is the script's docstring.

    Raises:
      SystemExit: a record is that of a quick run.
    """
    records = [json.loads(path.read_text()) | {"name": path.stem} for path in folder.glob("*.json")]
    for record in records:
        if record["quick"]:
            raise SystemExit(f"{folder}/{record['name']}.json is of a quick run; run the script")
        script = scripts / f"{record['name']}.py"
        if script.is_file():
            record["about"] = ast.get_docstring(ast.parse(script.read_text())) or ""
    return sorted(records, key=lambda r: (min(v["number"] for v in r["verdicts"]), r["name"]))


def readme_table(records: Sequence[Mapping[str, Any]]) -> str:
    """A row for each claim: the claim, its verdict, one number, a link to the details."""
    lines = ["| claim of the papers | verdict | measured | details |", "|---|---|---|---|"]
    for number, (claim, measured) in CLAIMS.items():
        own = [r for r in records if any(v["number"] == number for v in r["verdicts"])]
        verdicts = [v for r in own for v in r["verdicts"] if v["number"] == number]
        text = ""
        if own:
            tables = {arm: measures for r in own for arm, measures in r["table"].items()}
            text = measured(Found(tables, "; ".join(v["because"] for v in verdicts)))
        word = _in_a_word([v["holds"] for v in verdicts])
        links = ", ".join(f"[{_title(r)}]({PAGE}#{_title(r).replace(' ', '-')})" for r in own)
        lines.append(f"| {number}. {claim} | {word} | {text} | {links} |")
    return "\n".join(lines)


def _in_a_word(held: Sequence[bool]) -> str:
    if not held:
        return "not measured yet"
    return "**holds**" if all(held) else "in part" if any(held) else "does not hold"


def _title(record: Mapping[str, Any]) -> str:
    return record["name"].replace("_", " ")


def page(records: Sequence[Mapping[str, Any]], pictures: Path) -> str:
    """`docs/claims.md`."""
    total = sum(r["seconds"] for r in records)
    terms = "\n".join(f"* **{term}**: {meaning}" for term, meaning in TERMS.items())
    parts = ["# Claims, measured", ABOUT, RUNS.format(_duration(total)), "## Terms", terms]
    for record in records:
        parts += _section(record, pictures)
    return "\n\n".join(parts) + "\n"


def _section(record: Mapping[str, Any], pictures: Path) -> list[str]:
    seeds = ", ".join(map(str, record["seeds"]))
    parts = [
        f"## {_title(record)}",
        f"`{record['command']}`; seeds {seeds}; "
        f"{_duration(record['seconds'])}; jax {record['versions']['jax']}.",
        record["about"].split("\n\n", 2)[-1],
        _table(record["table"]),
        "\n".join(
            f"* **{'Holds' if v['holds'] else 'Does not hold'}** (claim {v['number']}): "
            f"{v['claim']}. {v['because']}."
            for v in record["verdicts"]
        ),
    ]
    for title, table in record.get("tables", {}).items():
        parts += [f"{title}:", _table(table)]
    for arm, rates in record.get("rates", {}).items():
        given = ", ".join(f"{rate}: {value:.3f}" for rate, value in rates.items())
        parts.append(f"Rates of {arm}, tried on a seed of their own: {given}.")
    for picture in record.get("pictures", ()):
        if not (pictures / picture).is_file():
            raise SystemExit(f"{pictures / picture} is missing; run the script again")
        parts.append(f"![{picture.removesuffix('.svg').replace('_', ' ')}](claims/{picture})")
    return parts


def _table(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    names = next(iter(table.values()))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for arm, measures in table.items():
        cells = [_number(m["mean"], m["low"], m["high"]) for m in measures.values()]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(mean: float, low: float, high: float) -> str:
    return f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def into(text: str, table: str) -> str:
    """The README with the table between its comments."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Writes or checks the two documents."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    records = read_results(RESULTS)
    wanted = {README: into(README.read_text(), readme_table(records)), PAGE: page(records, RESULTS)}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if options.check and stale:
        sys.exit(f"differs from the results: {', '.join(map(str, stale))}; run {sys.argv[0]}")
    for path in stale:
        path.write_text(wanted[path])
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
