"""Print the model card of a variant, as it is uploaded and fetched.

Examples:
    python -m stages.card variant=gptq-w4-g128
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

OPTIONS = [
    Option("variant", "NAME", "a variant of params.yaml, or by-hand/NAME for a manual run", required=True),
    Option("model", "OWNER/NAME", "what its `vllm serve` line names; by default the card's own folder", default="."),
]

if TYPE_CHECKING:
    from omegaconf import DictConfig


def card(cfg: DictConfig, arguments: dict[str, str | None]) -> None:
    from quantline.lifecycle.promotion_gates import faults_of
    from quantline.pipeline.config import parse
    from quantline.pipeline.hydra_values import plain
    from quantline.pipeline.records import variant_record
    from quantline.report.card import card_of

    record = variant_record(ROOT, str(arguments["variant"]))
    results = {str(result["stage"]): result for result in record.results}
    config = parse({**record.config, "promote": plain(cfg)["promote"]})
    faults = faults_of(results, config.promote, record.remedy)
    print(card_of(record, model=str(arguments["model"]), faults=faults), end="")


if __name__ == "__main__":
    main(card, __file__, OPTIONS, __doc__, reads=("promote",))
