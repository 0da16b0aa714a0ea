"""The nearest variant that would work: few and small changes first, each candidate checked by the same rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from quantline.checkpoints.layouts.choice import float_scheme, own_width, schemes_of
from quantline.planning.preflight import check
from quantline.planning.spec import FLOAT, Machine, Model, VariantSpec
from quantline.quantization import capabilities

# Distance of a change from the requested variant: another number of the same kind is near, another method is far.
_NEAR, _BITS, _METHOD = 1.0, 2.0, 3.0
_MOST_CHANGES = 3
_USUAL_GROUP = 128
# The most checks before giving up, and the most of them that fail by memory alone: 0.2 s for small models, 1 to 2 s for
# the largest.
_MOST_CHECKS, _MOST_TOO_LARGE = 200, 30

Change = tuple[float, str, Any]


def nearest(
    variant: VariantSpec, model: Model, machine: Machine, defaults: Mapping[str, Mapping[str, Any]] | None = None
) -> str | None:
    """The overrides of the nearest variant that passes all checks, or None.

    defaults: the options of each method. Methods other than the variant's are tried only if they are named here.
    """
    checks = too_large = 0
    for candidate in _candidates(variant, model, machine, defaults or {}):
        order = machine.order.get(candidate.method, ())
        if candidate.method != FLOAT and not capabilities.candidates(candidate.backend, order, candidate.requirements):
            continue
        checks += 1
        if checks > _MOST_CHECKS or too_large > _MOST_TOO_LARGE:
            return None
        plan = check(candidate, model, machine, sizes_of_refused=False)
        if plan.passes():
            return overrides(candidate, variant, defaults or {})
        too_large += plan.passes("quantize", "convert", "serve")
    return None


def overrides(candidate: VariantSpec, asked: VariantSpec, defaults: Mapping[str, Mapping[str, Any]]) -> str:
    """A variant as overrides: its method, bits and group size, and every option that differs from what was asked."""
    words = [f"method={candidate.method}"]
    if candidate.method != FLOAT and not _has_own_width(candidate):
        words += [f"bits={candidate.bits}", f"group_size={candidate.group_size}"]
    standard = defaults.get(candidate.method, {})
    words += [
        f"method.{key}={_shown(value)}" for key, value in candidate.options.items()
        if key not in standard or standard[key] != value
    ]  # fmt: skip
    for key, name in _PLAIN.items():
        if getattr(candidate, name) != getattr(asked, name):
            value = getattr(candidate, name)
            words.append(f"{key}={('quantized' if value else 'float') if name == 'lm_head' else _shown(value)}")
    if candidate.rules != asked.rules:
        words.append("layers=uniform")
    return " ".join(words)


_PLAIN = {
    "backend": "backend", "lm_head": "lm_head", "low_memory": "low_memory", "dtype": "dtype",
    "convert.target": "convert", "serve.dtype": "serve_dtype", "serve.process.tensor_parallel_size": "tensor_parallel_size",
    "quantize.gpus": "quantize_gpus",
}  # fmt: skip


def _candidates(
    variant: VariantSpec, model: Model, machine: Machine, defaults: Mapping[str, Mapping[str, Any]]
) -> Iterator[VariantSpec]:
    dimensions = list(_changes(variant, model, machine, defaults))
    ways: list[tuple[float, tuple[Change, ...]]] = []
    for count in range(1, _MOST_CHANGES + 1):
        for chosen in combinations(range(len(dimensions)), count):
            ways += [
                (sum(change[0] for change in way), way) for way in _product([dimensions[index] for index in chosen])
            ]
    for _, way in sorted(ways, key=lambda pair: pair[0]):
        candidate = variant
        # The method goes first, since it brings its own options.
        for _, key, value in sorted(way, key=lambda change: change[1] != "method"):
            candidate = _changed(candidate, key, value, defaults)
        yield candidate


def _product(dimensions: Sequence[Sequence[Change]]) -> Iterator[tuple[Change, ...]]:
    if not dimensions:
        yield ()
        return
    for change in dimensions[0]:
        for rest in _product(dimensions[1:]):
            yield (change, *rest)


def _changed(variant: VariantSpec, key: str, value: Any, defaults: Mapping[str, Mapping[str, Any]]) -> VariantSpec:
    if key == "method":
        size = (
            _USUAL_GROUP if _has_own_width(variant) else variant.group_size
        )  # a scheme's own is none of other methods
        return replace(variant, method=value, options=defaults.get(value, {}), backend="auto", group_size=size)
    if key.startswith("method."):
        name = key.removeprefix("method.")
        return replace(variant, options={**variant.options, name: value}) if name in variant.options else variant
    return replace(variant, **{key: value})


def _changes(
    variant: VariantSpec, model: Model, machine: Machine, defaults: Mapping[str, Mapping[str, Any]]
) -> Iterator[list[Change]]:
    """For each property that can change, its other values and their distances."""
    usual = {"sym": True, "desc_act": False, "zero_point": True, "version": "gemm", "activation_bits": None}
    for key, value in usual.items():
        if variant.options.get(key, value) != value:
            yield [(_NEAR, f"method.{key}", value)]
    for key, plain in (
        ("backend", "auto"),
        ("lm_head", False),
        ("low_memory", False),
        ("dtype", "auto"),
        ("quantize_gpus", 1),
        ("convert", "auto"),
    ):
        if getattr(variant, key) != plain:
            yield [(_NEAR, key, plain)]
    if variant.rules:
        yield [(_BITS, "rules", ())]
    if variant.serve_dtype not in ("auto", "bfloat16"):
        yield [(_NEAR, "serve_dtype", "bfloat16"), (_NEAR + 0.1, "serve_dtype", "float16")]
    elif variant.serve_dtype == "bfloat16":
        yield [(_NEAR, "serve_dtype", "float16")]
    if variant.tensor_parallel_size > 1:
        fewer = range(variant.tensor_parallel_size - 1, 0, -1)
        yield [(_BITS + (variant.tensor_parallel_size - size) / 100, "tensor_parallel_size", size) for size in fewer]
    if _is_float_scheme(variant):
        others = [scheme for scheme in schemes_of(variant.method) if scheme != variant.options["scheme"]]
        yield [(_NEAR + 0.1 * index, "method.scheme", scheme) for index, scheme in enumerate(others)]
    elif _has_own_width(variant):
        yield [(_NEAR, "method.imatrix", True)]
    elif variant.method != FLOAT:
        # -1 is one group per row: farther from any group size than these are from each other.
        sizes = [size for size in (128, 64, 32, 256, -1) if size != variant.group_size]
        yield [
            (_NEAR + 0.1 * index + (0.3 if size == -1 else 0), "group_size", size) for index, size in enumerate(sizes)
        ]
        widths = [bits for bits in (4, 8, 3, 2) if bits != variant.bits]
        yield [(_BITS + 0.1 * abs(bits - variant.bits), "bits", bits) for bits in widths]
    others = [
        name for name in (*machine.order, FLOAT) if name != variant.method and (name in defaults or name == FLOAT)
    ]
    yield [(_METHOD + 0.05 * index + (2 if name == FLOAT else 0), "method", name) for index, name in enumerate(others)]


def _is_float_scheme(variant: VariantSpec) -> bool:
    """Whether bits and groups are those of its scheme, whatever its options say of them."""
    return float_scheme(variant.method, variant.options) is not None


def _has_own_width(variant: VariantSpec) -> bool:
    """The same, of GGUF's mixtures, too."""
    return own_width(variant.method, variant.options) is not None


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
