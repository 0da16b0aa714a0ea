from __future__ import annotations

import json

import pytest
import report_records
from drill_results import drill

from quantline.core.errors import UserError
from quantline.pipeline.fleet_result import FILE, content_of, current_drill


def test_a_drill_counts_as_long_as_its_checkpoints_are_those_of_the_variants(tmp_path):
    records = report_records.records(tmp_path, whole=False, names=["gptq-w4-g128"])
    for record in records:
        for result in record.results:
            result["output_hash"] = f"{record.name} {result['stage']}"
    contents = {record.name: content_of(record) for record in records}
    assert contents == {"float": "float download", "gptq-w4-g128": "gptq-w4-g128 convert"}
    assert current_drill(tmp_path, records) is None
    path = tmp_path / FILE
    found = drill(contents)
    path.write_text(json.dumps(found))
    assert current_drill(tmp_path, records) == found
    path.write_text(json.dumps({"status": "not asked for"}))
    assert current_drill(tmp_path, records) is None
    path.write_text(json.dumps(drill({**contents, "float": "other"})))
    assert current_drill(tmp_path, records) is None
    path.write_text("{")
    with pytest.raises(UserError, match="remove it and run `dvc repro`"):
        current_drill(tmp_path, records)
