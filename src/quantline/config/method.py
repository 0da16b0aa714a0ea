"""The quantization methods and their options, under the names that their libraries and papers use."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from quantline.config.section import Section

BASELINE = "float"  # the method that quantizes nothing, and the variant that all others are compared with


class AwqMethod(Section):
    """Activation-aware weight quantization (arXiv:2306.00978)."""

    name: Literal["awq"]
    zero_point: bool
    version: Literal["gemm", "gemv", "exllama"]
    clip: bool


class GptqMethod(Section):
    """GPTQ (arXiv:2210.17323); activation_bits also rounds the inputs of linears, per token."""

    name: Literal["gptq"]
    damp_percent: float = Field(gt=0.0, lt=1.0)
    desc_act: bool
    sym: bool
    true_sequential: bool
    static_groups: bool
    activation_bits: Literal[8, "fp8"] | None = None
    # With a default, since configurations that were frozen before do not have it.
    solver: Literal["gptq", "gptaq", "foem"] = "gptq"


class RtnMethod(Section):
    """Round to nearest; activation_bits as for GPTQ."""

    name: Literal["rtn"]
    sym: bool
    activation_bits: Literal[8, "fp8"] | None = None
    # With a default, since configurations that were frozen before do not have it.
    grid: Literal["absmax", "mse"] = "absmax"


class Fp8Method(Section):
    """Weights in FP8 (E4M3), and inputs of linears too: data-free but for `static`."""

    name: Literal["fp8"]
    scheme: Literal["dynamic", "static", "block"]


class Fp4Method(Section):
    """Weights in FP4 (E2M1) with scales of small groups: NVFP4 or MXFP4; a16 leaves the inputs of linears alone."""

    name: Literal["fp4"]
    scheme: Literal["nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16"]


class Mxfp8Method(Section):
    """Weights in FP8 (E4M3) with scales that are powers of two (OCP MX); a16 leaves the inputs of linears alone."""

    name: Literal["mxfp8"]
    scheme: Literal["mxfp8", "mxfp8a16"]


class BnbMethod(Section):
    """NF4 and FP4 (arXiv:2305.14314) and LLM.int8 (arXiv:2208.07339): quick to load, no calibration."""

    name: Literal["bnb"]
    quant_type: Literal["nf4", "fp4"]
    double_quant: bool


class AutoRoundMethod(Section):
    """Rounding learned by signed gradient descent (arXiv:2309.05516)."""

    name: Literal["autoround"]
    sym: bool
    iters: int = Field(ge=0)
    batch_size: int = Field(ge=1)


GgufType = Literal[
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_L",
    "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS",
    "IQ1_M", "IQ1_S",
]  # fmt: skip
GGUF_TYPES: tuple[str, ...] = get_args(GgufType)


class GgufMethod(Section):
    """A GGUF file of llama.cpp: its mixtures of block types; imatrix weighs columns by their inputs in calibration."""

    name: Literal["gguf"]
    type: GgufType
    imatrix: bool


class FloatMethod(Section):
    """No quantization: the baseline."""

    name: Literal["float"]


Method = Annotated[
    AwqMethod
    | GptqMethod
    | RtnMethod
    | Fp8Method
    | Fp4Method
    | Mxfp8Method
    | BnbMethod
    | AutoRoundMethod
    | GgufMethod
    | FloatMethod,
    Field(discriminator="name"),
]
Backend = Literal[
    "auto", "autoawq", "auto_gptq", "gptqmodel", "llmcompressor", "bitsandbytes", "autoround", "native", "llamacpp"
]


class LayerRule(Section):
    """An exception for the linears whose full name matches: left in float, or with other bits or groups."""

    match: str = Field(min_length=1, description="pattern of the linear's full name, with * and ? as in a shell")
    skip: bool = Field(default=False, description="leave these linears in float")
    bits: int | None = Field(default=None, description="bits of a weight; null takes `bits`")
    group_size: int | None = Field(default=None, description="group size; null takes `group_size`")


class LayersConfig(Section):
    """Rules by name; the first one that matches a linear counts."""

    rules: list[LayerRule]
