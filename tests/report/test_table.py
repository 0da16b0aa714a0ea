from __future__ import annotations

from quantline.report.table import Table, as_csv, variant_column
from quantline.report.units import Column

TABLE = Table(
    "t", "A caption.", (variant_column(), Column("loss", "loss", "nats", "low", "high")),
    [
        {"variant": "a,b", "loss": 1.5, "low": 1.0, "high": 2.0, "extra": {"k": [1]}},
        {"variant": "c", "loss": None},
    ], shown=1,
)  # fmt: skip


def test_a_page_shows_the_first_rows_and_the_file_all_of_them():
    assert TABLE.page_rows == TABLE.rows[:1]
    assert as_csv(TABLE).splitlines() == [
        "variant,loss,low,high,extra",
        '"a,b",1.5,1.0,2.0,"{""k"": [1]}"',
        "c,,,,",
    ]
