"""Every number of the README's table of claims stands in a committed table, in its place."""

import re

import pandas as pd
import pytest

# README row (start of its first cell) -> table, claim in the table, text of the "measured" cell.
ROWS = {
    "Patch tokens take 95.7% less forward time": (
        "03_verdicts.csv",
        "patch tokens take less time: warm, in turn",
        "{estimate:.0f}% less",
    ),
    "by the published protocol": (
        "03_verdicts.csv",
        "patch tokens take less time: as published, channel first",
        "{estimate:.0f}% less",
    ),
    "65,188,584 parameters": (
        "03_verdicts.csv",
        "channel tokens: parameters",
        "{estimate:,.0f}",
    ),
    "66,256,262 parameters": ("03_verdicts.csv", "patch tokens: parameters", "{estimate:,.0f}"),
    "Equal accuracy, translation": (
        "04_verdicts.csv",
        "patch not worse than channel, translation",
        "{estimate:+.2f} mm",
    ),
    "Equal accuracy, rotation": (
        "04_verdicts.csv",
        "patch not worse than channel, rotation",
        "{estimate:+.2f} deg",
    ),
    "A transformer improves single-frame guidance": (
        "04_verdicts.csv",
        "patch better than no transformer, rotation",
        "{estimate:+.2f} deg",
    ),
}


@pytest.fixture(scope="module")
def table(root):
    """The README's table of claims as lists of cells."""
    text = (root / "README.md").read_text()
    lines = text[text.index("| claim |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("start", ROWS)
def test_a_row_says_what_the_table_holds(root, table, start):
    name, claim, text = ROWS[start]
    [cells] = [cells for cells in table if cells[0].startswith(start)]
    committed = pd.read_csv(root / "figures" / name)
    [row] = committed[committed["claim"] == claim].to_dict("records")
    assert cells[1] == text.format(**row)
    assert cells[2] == row["verdict"]


def test_every_row_is_checked_and_no_other_number_is_claimed(root, table):
    assert all(any(cells[0].startswith(start) for start in ROWS) for cells in table)
    assert len(table) == len(ROWS)
    text = (root / "README.md").read_text()
    prose = text.replace(text[text.index("| claim |") :].split("\n\n")[0], "")
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", prose, flags=re.S)
    # The published claims, the versions of Python, and times that the text dates as measured.
    allowed = {"95.7", "3.11", "3.13"}
    assert set(re.findall(r"\d+\.\d+", prose)) <= allowed
