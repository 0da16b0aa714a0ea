"""Judge a variant on captured requests, after `stages.fleet up capture.share=0.1`.

What users wrote is scored under the variant and what it is compared with, one after the other, so that no second model has
to run beside the fleet. Exits with 1 where the variant is worse than allowed.

Examples:
    python -m stages.shadow variant=awq-w4-g128
    python -m stages.shadow variant=gptq-w4-g128 against=awq-w4-g128 requests=1000
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

OPTIONS = [
    Option("variant", "NAME", "a variant, MODEL@ALIAS, or a folder", required=True),
    Option(
        "against",
        "NAME",
        "what it is compared with: the float model, or the variant that it is to follow",
        default="float",
    ),
    Option(
        "most_increase", "0.02", "of the perplexity; default: promote.max_perplexity_increase against float, else 0.02"
    ),
    Option("requests", "500", "the newest that are scored; 0 takes all", default="500"),
]
READS = ("fleet", "promote", "evaluate", "serve", "device", "toolchains", "tracking")

if TYPE_CHECKING:
    from omegaconf import DictConfig


def shadow(cfg: DictConfig, arguments: dict[str, str | None]) -> None:
    from hydra.core.hydra_config import HydraConfig

    from quantline.core.errors import GateError, UserError
    from quantline.lifecycle.serve import Typed
    from quantline.lifecycle.shadow import Question
    from quantline.lifecycle.shadow import shadow as judged
    from quantline.pipeline.hydra_values import plain

    most = str(arguments["requests"])
    if not most.isdecimal():
        raise UserError(f"requests={most}: give a number; 0 takes all captured requests")
    typed = Typed(plain(cfg), list(HydraConfig.get().overrides.task))
    try:
        increase = None if arguments["most_increase"] is None else float(arguments["most_increase"])
    except ValueError:
        raise UserError(f"most_increase={arguments['most_increase']}: give a number such as 0.02") from None
    if increase is not None and not 0 <= increase < float("inf"):
        raise UserError(f"most_increase={arguments['most_increase']}: give 0 or more, such as 0.02")
    question = Question(str(arguments["variant"]), str(arguments["against"]), increase, int(most))
    verdict, path = judged(ROOT, typed, question)
    interval = verdict.difference
    said = (
        f"{verdict.verdict}: {interval.estimate:+.4f} nats a token against {question.against}, {interval.low:+.4f} to "
        f"{interval.high:+.4f}, on {verdict.requests} requests of {verdict.tokens} tokens; allowed are {verdict.limit:+.4f}"
    )
    print(said)
    if verdict.verdict == "sound" and interval.low > 0:
        print("  it is measurably worse, within what is allowed")
    if verdict.enough:
        print(f"  about {verdict.enough} requests would decide")
    print(f"  {path}")
    if verdict.verdict == "worse":
        raise GateError(f"{arguments['variant']}: is worse than allowed; see {path}")


if __name__ == "__main__":
    from quantline.lifecycle.fleet import with_section

    sys.argv[1:] = with_section(sys.argv[1:])
    main(shadow, __file__, OPTIONS, __doc__, reads=READS)
