"""What llm-compressor does by itself, beside what it does in the worker."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch

from quantline.checkpoints.model_config import read_config
from quantline.toolchains.protocol import Reporter, worker_main
from quantline.toolchains.workers.quantizers import llmcompressor
from quantline.toolchains.workers.quantizers import model as _common


def calibration_error(job, mended):
    """How far what reaches the last norm in calibration is from what does in the model itself, relative."""
    from llmcompressor.args.dataset_arguments import DatasetArguments
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.pipelines.cache import IntermediatesCache
    from llmcompressor.pipelines.sequential.helpers import trace_subgraphs
    from llmcompressor.utils.helpers import calibration_forward_context
    from llmcompressor.utils.pytorch.module import infer_sequential_targets

    work = _common.load(job, read_config(job["model"]), translate=False)
    model, seen = work.model, []
    linearize_moe(model)
    model.model.norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    ids = torch.from_numpy(work.calibration[:1].astype(np.int64))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    state = SimpleNamespace(work=work, current="tracing")
    with torch.no_grad(), llmcompressor.library(state) if mended else nullcontext():
        model(**batch)
        graphs = trace_subgraphs(model, batch, infer_sequential_targets(model), DatasetArguments().tracing_ignore)
        with calibration_forward_context(model):
            values = IntermediatesCache.from_dataloader([batch])
            for number, graph in enumerate(graphs):
                output = graph.forward(model, **values.fetch(0, graph.input_names))
                if number < len(graphs) - 1:
                    values.update(0, output)
    return float((seen[-1] - seen[0]).norm() / seen[0].norm())


def replaced():
    from llmcompressor.pipelines.cache import IntermediatesCache
    from llmcompressor.pipelines.sequential.helpers import SequentialTracer

    names = ("_offload_value", "_onload_value", "pin_memory")
    return [*(IntermediatesCache.__dict__[name] for name in names), SequentialTracer.create_arg]


def run(job, report):
    _common.start(job)
    facts = {
        "plain": calibration_error(job, mended=False),
        "mended": calibration_error(job, mended=True),
    }
    before = replaced()
    llmcompressor.run(job, Reporter())
    facts["put_back"] = [a is b for a, b in zip(before, replaced(), strict=True)]
    return facts


if __name__ == "__main__":
    worker_main(run)
