"""Choose the widths of a variant's layers by a budget: the least loss under a size, or the least size under a loss.

The losses come from `stages.sensitivity`, which runs first where it has not yet. The answer is an
ordinary line for params.yaml.

Examples:
    python -m stages.allocate method=gptq group_size=64 to_bits=4.5
    python -m stages.allocate method=gptq group_size=64 to_loss=0.02 apply=gptq-mixed
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

OPTIONS = [
    Option("to_bits", "4.5", "the size: bits a weight of the quantized linears, scales and zero points included"),
    Option("to_gb", "5", "the size: of the whole checkpoint, in 10**9 bytes"),
    Option("to_loss", "0.02", "the loss: sum of the units' divergences, in nats a token; the size is then minimized"),
    Option("apply", "NAME", "write the variant into params.yaml under this name"),
]

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

    from quantline.pipeline.config import Config
    from quantline.planning.budget import Budget, Limit

READS = ("model", "method", "group_size", "backend", "calibration", "sensitivity", "convert", "serve", "device")


def allocate(cfg: DictConfig, arguments: dict[str, str | None]) -> None:
    from hydra.core.hydra_config import HydraConfig

    from quantline.core.errors import UserError
    from quantline.evaluation.unit_losses import BUDGETED
    from quantline.pipeline import preflight
    from quantline.pipeline.chosen import keep
    from quantline.pipeline.config import parse
    from quantline.pipeline.hydra_values import plain
    from quantline.pipeline.params_file import add_variant, line_of, refuse_unwritable
    from quantline.pipeline.paths import PIPELINE_HOME
    from quantline.pipeline.run import StageRun
    from quantline.planning.budget import budget

    limit, config = _limit(arguments), parse(plain(cfg))
    overrides = list(HydraConfig.get().overrides.task)
    run = StageRun("sensitivity", config, ROOT, tuple(overrides))
    run.refuse_float()
    if config.method.name not in BUDGETED:
        raise UserError(
            f"method={config.method.name}: has no widths to choose from; take method={' or '.join(BUDGETED)}"
        )
    if arguments["apply"] is not None:
        refuse_unwritable(ROOT / "params.yaml", arguments["apply"])
    losses = measured_losses(config, overrides)
    model, place = preflight.model_of(run), preflight.machine_of(config, ROOT)
    found = budget(preflight.variant_spec(config.model_dump()), model, place, losses, limit)
    line = line_of_budget(found, overrides)
    print(_text(found, line_of(line)))
    if (name := arguments["apply"]) is not None:
        named, own = own_line(line)
        add_variant(ROOT / "params.yaml", name, own)
        keep(ROOT / PIPELINE_HOME / named, name, own, losses, group_size=config.group_size)
        print(f"params.yaml: {name}", file=sys.stderr)


def measured_losses(config: Config, overrides: list[str]) -> dict[tuple[str, int], float]:
    """The losses of a configuration's units in nats by unit and bits; measured first where they are not there yet.

    Raises:
        UserError: they cannot be measured.
    """
    import stages.calibrate
    import stages.download
    import stages.sensitivity  # noqa: F401  # they register their functions
    from quantline.core.errors import UserError
    from quantline.evaluation import unit_losses
    from quantline.pipeline.execute import run_until
    from quantline.pipeline.identity import stage_fingerprint
    from quantline.pipeline.inputs import output_with_fingerprint
    from stages import WORK

    wanted = stage_fingerprint(config, "sensitivity", ROOT)
    folder = output_with_fingerprint(ROOT, "sensitivity", wanted)
    if folder is None:
        run_until("sensitivity", WORK, config, ROOT, overrides)
        folder = output_with_fingerprint(ROOT, "sensitivity", wanted)
    if folder is None:
        raise UserError("the losses were not measured; run `python -m stages.sensitivity` with the same options")
    return unit_losses.read(folder)


def _limit(arguments: dict[str, str | None]) -> Limit:
    from quantline.core.errors import UserError
    from quantline.planning.budget import Limit

    given = {name: arguments[name] for name in ("to_bits", "to_gb", "to_loss") if arguments[name] is not None}
    if len(given) != 1:
        raise UserError("give one of to_bits=4.5, to_gb=5 and to_loss=0.02")
    ((name, text),) = given.items()
    try:
        value = float(str(text))
    except ValueError:
        raise UserError(f"{name}={text}: is not a number") from None
    if not 0 < value < float("inf"):
        raise UserError(f"{name}={text}: give a positive number")
    return Limit(**{{"to_bits": "bits", "to_gb": "gigabytes", "to_loss": "loss"}[name]: value})


def line_of_budget(found: Budget, overrides: Sequence[str]) -> list[str]:
    """The overrides of the variant: those that were given, with its method, bits and rules."""
    from quantline.pipeline.overrides import key_of
    from quantline.planning.search_space import overrides_of

    kept = [one for one in overrides if key_of(one) not in ("method", "bits", "layers", "layers.rules", "variant")]
    return [*overrides_of(found.variant), *kept]


def own_line(line: Sequence[str]) -> tuple[str, list[str]]:
    """The model of params.yaml that a line is about, and its overrides that neither `shared` nor that model has.

    The model is empty where there is one, or where no line of `models:` is a part of this one.
    """
    from quantline.pipeline.compose import read_params
    from quantline.pipeline.overrides import split

    content = read_params(ROOT / "params.yaml")
    models = {name: split(of, f"params.yaml: models.{name}") for name, of in (content.get("models") or {}).items()}
    meant = [name for name, of in models.items() if set(of) <= set(line)]
    given = [*split(content.get("shared"), "params.yaml: shared"), *(one for name in meant for one in models[name])]
    return next(iter(meant), ""), [one for one in line if one not in given]


def _text(found: Budget, line: str) -> str:
    from collections import Counter

    from quantline.core.text import binary_size

    counts = Counter(found.allocation.widths.values())
    shares = ", ".join(f"{count} x {'float' if bits == 16 else bits}" for bits, count in sorted(counts.items()))
    assert found.plan.weights is not None
    lines = [
        f"taken   {found.taken}: {shares}",
        f"size    {binary_size(found.plan.weights.total)}, {found.bits:.3f} bits a quantized weight",
        f"loss    {found.allocation.loss:.4g} nats a token, the sum of the units'",
        f"widths  {', '.join('float' if bits == 16 else str(bits) for bits in found.widths)}, by the method and the server",
    ]
    if found.uniform is None:
        lines.append("uniform no single width meets the limit")
    else:
        lines.append(
            f"uniform {found.uniform.uniform} bits: {found.uniform.loss:.4g} nats, {binary_size(found.uniform.size)}"
        )
    return "\n".join([*lines, "", line])


if __name__ == "__main__":
    main(allocate, __file__, OPTIONS, __doc__, reads=READS)
