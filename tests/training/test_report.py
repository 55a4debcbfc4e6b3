"""Reports hold any name."""

import csv

from sgformer.core.files import write_text
from sgformer.training.report import class_tables, csv_text, facts_table


def test_names_stay_in_their_cells():
    table = class_tables(["Class", "Images"], [["a|b", 1], ["*c*_d", 2], ["<b>\n$x$", 3], ["raw\udcff", 4]])
    assert table[2:] == [
        *("| Class | Images |", "|---|---|"),
        *("| a\\|b | 1 |", "| \\*c\\*\\_d | 2 |", "| &lt;b&gt;\\\\n\\$x\\$ | 3 |", "| raw\\\\xff | 4 |", ""),
    ]
    assert facts_table({"Data": "a|b"})[2] == "| Data | a\\|b |"


def test_a_table_with_any_name_is_written_and_read(tmp_path):
    names = ["a|b", 'x,"y"', "two\nlines", "猫", "raw\udcff"]
    write_text(tmp_path / "t.csv", csv_text(["class"], [[name] for name in names]))
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        rows = [row["class"] for row in csv.DictReader(file)]
    assert rows == [*names[:4], "raw\\udcff"]
