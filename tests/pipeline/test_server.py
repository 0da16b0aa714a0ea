from __future__ import annotations

import pytest

from quantline.pipeline.config import parse
from quantline.pipeline.run import StageRun
from quantline.pipeline.server import server_options


@pytest.mark.parametrize(("quantized", "dtype"), [(True, "float16"), (False, "bfloat16")])
def test_a_server_is_started_with_the_options_of_the_variant(composed, tmp_path, quantized, dtype):
    config = parse(composed("serve.max_model_len=256", "serve.enforce_eager=true", "device=cpu"))
    options = server_options(StageRun("serve_smoke", config, tmp_path, ()), quantized=quantized)
    assert (options.device, options.dtype, options.max_model_len, options.enforce_eager) == ("cpu", dtype, 256, True)
