"""Rows as the content of files."""

from __future__ import annotations

import json


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(content):
    import zstandard

    return zstandard.compress(content)


def parquet(rows):
    import pyarrow as arrow
    from pyarrow import parquet as writer

    sink = arrow.BufferOutputStream()
    writer.write_table(arrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()
