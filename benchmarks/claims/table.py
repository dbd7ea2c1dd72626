"""The README's table of claims and `docs/claims.md`, from the results in `docs/claims/*.json`.

    python benchmarks/claims/table.py            # writes both
    python benchmarks/claims/table.py --check    # fails if they are not what the results say

The table stands in the README between two comments; nobody edits it by hand.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS, README, PAGE = Path("docs/claims"), Path("README.md"), Path("docs/claims.md")
BEGIN, END = "<!-- claims: begin -->", "<!-- claims: end -->"
CLAIMS = {
    1: "GRPO's accuracy in a quarter of the generations, where rewards are sparse",
    2: "without rich feedback, ahead of GRPO or equal",
    3: "shorter responses than GRPO's at equal accuracy",
    4: "one hard question, no reward yet: half the attempts of best-of-k and of asking in turns",
    5: "the teacher gets better, and the student passes the initial teacher",
    6: "larger models gain more over GRPO",
    7: "finer credit is no worse; nor are solution and feedback together",
    8: "in runs ten times as long as needed the default teacher does not collapse, a live one does",
    9: "SDFT learns a new task as well as SFT and keeps more of the old",
    10: "the gain is information, not style",
    11: "virtually GRPO's time for a step",
}
"""What the papers claim, in the order of the table."""
ABOUT = """\
Written by `benchmarks/claims/table.py` from `docs/claims/*.json`; the table of all claims stands
in the [README](../README.md#the-claims-in-small). The numbers speak of models of a million
parameters and less on generated requests: what holds here need not hold for large ones, nor the
other way round.

Values are means over seeds with 95 % intervals (Student's t), what another set of seeds might give;
they know no bounds, and may reach below 0 or above 1 where a share cannot. Differences are taken
seed by seed. "Ahead" holds if the whole interval of the differences is above 0; "no worse" holds if
that interval is not wholly below 0. Where a claim names a number, the interval's worse end has to
reach it. Machine: 2 CPU cores, two runs at a time on one core each."""


RUNS = (
    "The runs of the tables took {}, added up; searches for rates and start models are not in it."
)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The records of all scripts, by the first claim that they speak of; quick ones are refused."""
    records = [json.loads(path.read_text()) | {"name": path.stem} for path in folder.glob("*.json")]
    for record in records:
        if record["quick"]:
            raise SystemExit(f"{folder}/{record['name']}.json is of a quick run; run the script")
    return sorted(records, key=lambda r: (min(v["number"] for v in r["verdicts"]), r["name"]))


def readme_table(records: Sequence[Mapping[str, Any]]) -> str:
    """A row for each claim; one without results says so, one that holds in part says in which."""
    lines = [
        "| | claim of the papers | in small | measured |",
        "|---|---|---|---|",
    ]
    for number, claim in CLAIMS.items():
        found = [(r, v) for r in records for v in r["verdicts"] if v["number"] == number]
        verdicts = [v for _, v in found]
        words = _in_a_word([v["holds"] for v in verdicts])
        text = _parts(verdicts) if words == "in part" else "; ".join(v["because"] for v in verdicts)
        links = "".join(f" ([how]({link}))" for link in dict.fromkeys(_anchor(r) for r, _ in found))
        lines.append(f"| {number} | {claim} | {words} | {text}{links} |")
    return "\n".join(lines)


def _parts(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """What holds, then what does not; the numbers are on the page."""
    held = {word: [v["claim"] for v in verdicts if v["holds"] == word] for word in (True, False)}
    return f"holds: {'; '.join(held[True])}. Does not hold: {'; '.join(held[False])}"


def _in_a_word(held: Sequence[bool]) -> str:
    if not held:
        return "not measured yet"
    return "**holds**" if all(held) else "in part" if any(held) else "does not hold"


def _anchor(record: Mapping[str, Any]) -> str:
    return f"{PAGE}#{record['name'].replace('_', '-')}"


def page(records: Sequence[Mapping[str, Any]], pictures: Path) -> str:
    """`docs/claims.md`."""
    total = sum(r["seconds"] for r in records)
    parts = ["# Claims, measured", ABOUT, RUNS.format(_duration(total))]
    for record in records:
        parts += _section(record, pictures)
    return "\n\n".join(parts) + "\n"


def _section(record: Mapping[str, Any], pictures: Path) -> list[str]:
    seeds = ", ".join(map(str, record["seeds"]))
    parts = [
        f"## {record['name'].replace('_', ' ')}",
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
    wanted = {
        README: into(README.read_text(), readme_table(records)),
        PAGE: page(records, RESULTS),
    }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if options.check and stale:
        sys.exit(f"not what the results say: {', '.join(map(str, stale))}; run {sys.argv[0]}")
    for path in stale:
        path.write_text(wanted[path])
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
