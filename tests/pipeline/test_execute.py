from __future__ import annotations

from quantline.pipeline.config import parse
from quantline.pipeline.execute import seeded


def test_the_seed_goes_to_the_calibration_samples_too(composed):
    config = seeded(parse(composed("method=gptq")), 7)
    assert (config.seed, config.calibration.seed) == (7, 7)
