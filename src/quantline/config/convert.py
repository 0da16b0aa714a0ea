"""Options of the conversion."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from quantline.config.section import Section


class ConvertConfig(Section):
    """The layout to hand to the serving target."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    target: Literal[
        "auto", "keep", "awq", "gptq", "gptq_v2", "compressed_tensors", "msmodelslim", "msmodelslim_ascend_v1"
    ]
    shard_size: str = "4GB"
    requantize_outliers: bool = False
    must_serve: Literal["vllm"] | None = Field(default=None, alias="for")


class ConvertSourceConfig(Section):
    """Where the convert stage takes its checkpoint from; other than the pipeline's, for runs by hand."""

    kind: Literal["pipeline", "auto", "msmodelslim"] = "pipeline"
    path: str | None = None
