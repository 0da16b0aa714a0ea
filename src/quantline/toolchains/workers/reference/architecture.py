"""Compares the names and shapes of a checkpoint's tensors with transformers' model of its config.json; reads no weights.

The model is built on the meta device and loads tensors without memory, so that transformers renames, splits and fuses names
as it would with real ones.

Job: `config` (folder of config.json), `shapes` (float name -> shape), `zero_biases` (biases of quantized linears that are
all zero, which some quantizers add). Result: `unknown`, why transformers cannot say, or None; `class` and `version`;
`faults`, what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantline.toolchains.protocol import Reporter, worker_main
from quantline.toolchains.workers.reference.accounting import config_of, unaccounted


def run(job: Mapping[str, Any], report: Reporter) -> dict[str, Any]:
    """Run one job, see the module's description."""
    import torch
    import transformers
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    answer: dict[str, Any] = {"unknown": None, "class": None, "version": transformers.__version__, "faults": []}
    try:
        config = config_of(Path(job["config"]))
        with torch.device("meta"):
            skeleton = _class_of(config)(config)
    except Exception as error:  # a config that transformers cannot read raises anything
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return {**answer, "unknown": f"transformers {transformers.__version__} cannot build its model ({first[:200]})"}
    state = {name: torch.empty(shape, device="meta") for name, shape in job["shapes"].items()}
    answer["class"] = type(skeleton).__name__
    try:
        _, loaded = type(skeleton).from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, device_map="meta", output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except RuntimeError as error:
        return {**answer, "faults": [f"tensors do not combine to those of the model ({str(error).splitlines()[0]})"]}
    return {**answer, "faults": unaccounted(loaded, set(job["zero_biases"]))}


def _class_of(config: Any) -> Any:
    """The class that config.json names, or the causal LM of its type.

    Raises:
        ValueError: transformers knows neither.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    named = getattr(transformers, str(next(iter(config.architectures or ()), "")), None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    return lambda own: AutoModelForCausalLM.from_config(own, trust_remote_code=False)


if __name__ == "__main__":
    worker_main(run)
