from __future__ import annotations

from quantline.core.files import write_json
from quantline.pipeline.records import noise_floor


def test_only_a_noise_result_of_the_same_identity_is_taken(tmp_path):
    runs = [{"seed": seed, "nll_difference": lost} for seed, lost in enumerate((0.02, 0.01, 0.04))]
    result = {
        "schema": 1, "stage": "noise", "status": "ok", "metrics": {}, "fingerprint": "f3", "output_hash": "h",
        "tables": {"runs": runs},
    }  # fmt: skip
    write_json(tmp_path / "scratch" / "v" / "noise.json", result)
    found = noise_floor(tmp_path, "f{}".format)
    assert found == {
        "runs": 3, "low": 0.01, "high": 0.04, "seeds": [0, 1, 2], "unit": "nats/token", "output_hash": "h"
    }  # fmt: skip
    assert noise_floor(tmp_path, "other{}".format) is None
    assert noise_floor(tmp_path / "nowhere", "f{}".format) is None
