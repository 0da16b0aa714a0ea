"""What a stage says of its result when it is done: one line for a reader. Every metric is in the stage's result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from quantline.core.text import decimal_size, digits
from quantline.evaluation.nats import growth
from quantline.pipeline.figures import difference_text

Metrics = Mapping[str, float]
# Of a stage without a sentence of its own.
_MOST = 6
# Of a stage that was asked for nothing.
_NOTHING = {
    "tasks": "nothing to do: no tasks are chosen (tasks=none)",
    "speed": "nothing to do: no measurement is chosen (speed=none)",
}


def told(stage: str, metrics: Metrics, *, refused: bool = False) -> str:
    """The figures of a stage that a reader looks for first, or that it had nothing to do; empty if it measured nothing.

    refused: the server does not take the variant, which a reason tells.
    """
    if not metrics and not refused and stage in _NOTHING:
        return _NOTHING[stage]
    parts = list(_SENTENCES[stage](metrics)) if stage in _SENTENCES else []
    if not parts:
        shown = [f"{name} {digits(value, 4)}" for name, value in sorted(metrics.items())]
        parts = [*shown[:_MOST], *([f"and {len(shown) - _MOST} more"] if len(shown) > _MOST else [])]
    return ", ".join(parts)


def _download(metrics: Metrics) -> Iterator[str]:
    if "size_bytes" in metrics:
        yield f"{decimal_size(metrics['size_bytes'])} in {metrics['files']:.0f} files"


def _calibrate(metrics: Metrics) -> Iterator[str]:
    if "samples" in metrics:
        yield f"{metrics['samples']:.0f} samples of {metrics['tokens']:.0f} tokens together"


def _quantize(metrics: Metrics) -> Iterator[str]:
    if "linears_quantized" in metrics:
        yield f"{metrics['linears_quantized']:.0f} of {metrics['linears_expected']:.0f} linears"
    if "effective_bits" in metrics:
        yield f"{digits(metrics['effective_bits'], 3)} bits a weight"
    if "output_error_max" in metrics:
        mean, worst = digits(metrics["output_error_mean"], 2), digits(metrics["output_error_max"], 2)
        yield f"output error {mean}, of the worst {worst}"
    if "quantize_seconds" in metrics:
        yield f"quantized in {digits(metrics['quantize_seconds'], 3)} s"


def _convert(metrics: Metrics) -> Iterator[str]:
    if "linears" in metrics:
        changed = metrics.get("largest_relative_weight_difference", 0.0)
        yield f"{metrics['linears']:.0f} linears"
        yield f"largest relative change of a weight {digits(changed, 2)}" if changed else "no weight changed"


def _serve_smoke(metrics: Metrics) -> Iterator[str]:
    if "load_seconds" in metrics:
        yield f"loaded in {digits(metrics['load_seconds'], 3)} s"
    if "output_tokens_per_second" in metrics:
        yield f"{digits(metrics['output_tokens_per_second'], 3)} tokens/s of one request"


def _evaluate(metrics: Metrics) -> Iterator[str]:
    if "reference_perplexity" in metrics:
        yield f"perplexity {digits(metrics['reference_perplexity'], 4)}"
    if metrics.get("nll_difference"):
        ends = {"": "nll_difference", "low_": "nll_difference_low", "high_": "nll_difference_high"}
        row = {f"difference_{end}percent": 100 * growth(metrics[name]) for end, name in ends.items()}
        yield f"{difference_text(row)} against float"
        if "kl_divergence" in metrics:
            yield f"KL {digits(metrics['kl_divergence'], 3)} nats/token"
        if "top1_agreement" in metrics:
            yield f"same likeliest token {100 * metrics['top1_agreement']:.1f} %"
    if "size_bytes" in metrics:
        yield decimal_size(metrics["size_bytes"])


def _tasks(metrics: Metrics) -> Iterator[str]:
    for name, value in sorted(metrics.items()):
        kind, _, rest = name.partition("/")
        if kind == "task":
            kept = metrics.get(f"recovery/{rest}")
            yield f"{rest} {digits(value, 3)}" + ("" if kept is None else f" ({100 * kept:.0f} % of float's)")


def _speed(metrics: Metrics) -> Iterator[str]:
    for name, value in metrics.items():
        if name.startswith("speed_up_c"):
            yield f"{value:.2f}x as fast as float with {name.removeprefix('speed_up_c')} at a time"
    if "library_tokens_per_second" in metrics:
        yield f"{digits(metrics['library_tokens_per_second'], 3)} tokens/s by its own library"


_SENTENCES: dict[str, Callable[[Metrics], Iterator[str]]] = {
    "download": _download, "calibrate": _calibrate, "quantize": _quantize, "convert": _convert,
    "serve_smoke": _serve_smoke, "evaluate": _evaluate, "tasks": _tasks, "speed": _speed,
}  # fmt: skip
