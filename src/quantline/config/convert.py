"""Options of the conversion."""

from __future__ import annotations

from typing import Literal

from pydantic import ByteSize, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from quantline.config.section import Section

_SIZE = TypeAdapter(ByteSize)


class ConvertConfig(Section):
    """The layout to convert to.

    Attributes:
        target: auto, keep, or the `target` of a layout.
        shard_size: of the output files, such as 4GB. It is kept as given: its text is part of the identity.
        requantize_outliers: requantize groups that have no exact zero point.
        must_serve: refuse what the server cannot load, instead of warning.
    """

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    target: Literal[
        "auto", "keep", "awq", "gptq", "gptq_v2", "compressed_tensors", "msmodelslim", "msmodelslim_ascend_v1"
    ]
    shard_size: str = "4GB"
    requantize_outliers: bool = False
    must_serve: Literal["vllm"] | None = Field(default=None, alias="for")

    @field_validator("shard_size")
    @classmethod
    def _is_a_size(cls, text: str) -> str:
        try:
            size = int(_SIZE.validate_python(text))
        except ValidationError:
            size = 0
        if size < 1 or not text.strip()[-1].isalpha() or text.strip().lower().endswith("bit"):
            raise PydanticCustomError("size", "give a size such as 4GB or 500MB")
        return text

    @property
    def shard_bytes(self) -> int:
        """The size of an output file in bytes."""
        return int(_SIZE.validate_python(self.shard_size))


class ConvertSourceConfig(Section):
    """Where the convert stage gets its checkpoint; other kinds than `pipeline` are for standalone runs."""

    kind: Literal["pipeline", "auto", "msmodelslim", "gguf"] = "pipeline"
    path: str | None = None
