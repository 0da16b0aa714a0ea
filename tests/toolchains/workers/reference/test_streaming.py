"""Models of many families, computed part by part, beside transformers' own model of the same files."""

from __future__ import annotations

import json
import subprocess

import pytest

from quantline.toolchains.environments import ensure
from quantline.toolchains.toolchain import worker_environment

pytestmark = pytest.mark.toolchain("reference")

# What their forward passes do besides calling one layer after the other.
FAMILIES = {
    "llama": "nothing",
    "opt": "learned positions",
    "gpt2": "layers that return a tuple, a tied head",
    "bloom": "a norm behind the embeddings",
    "gemma4_text": "reads the embeddings again in every layer",
    "llama4_text": "sends the ids to the device of the embeddings' weights",
    "mixtral": "experts stacked in one tensor",
    "qwen2_moe": "experts and one that all tokens share",
    "mamba": "no attention",
    "lfm2": "convolutions between the attention layers",
}

RUN = """
import json, sys
from pathlib import Path
import numpy as np
import torch
import transformers
from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.reference import streaming
from quantline.toolchains.workers.reference.skeleton import attention_of
import make_families

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
ids = np.random.default_rng(0).integers(0, 256, (3, 24))
answers = {}
for family in sys.argv[2:]:
    folder = Path(sys.argv[1]) / family
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(make_families.config_of(family))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.05)  # some families leave experts unset
    made.save_pretrained(folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention_of(made.config))
    with torch.inference_mode():
        expected = plain(input_ids=torch.from_numpy(ids), use_cache=False).logits.flatten(0, 1)
        for limit in (0, 2**31):
            streaming.KEEP_BYTES = limit
            model = streaming.StreamedModel(folder)
            batches, progress = [model.batch(ids), model.batch(ids[:2])], []
            model.to_the_head(batches, lambda *step: progress.append(step))
            logits = [model.logits(batch) for batch in batches]
            model.release()
            answers[f"{family} {limit}"] = {
                "equal": bool(torch.equal(logits[0], expected)), "apart": float((logits[0] - expected).abs().max()),
                "other batch": float((logits[1] - expected[:48]).abs().max()), "filled": model.skeleton.filled,
                "parts": list(model.skeleton.parts), "computed": [label for _, _, label in progress[::2]],
            }
folder = Path(sys.argv[1]) / "hrm_text"
transformers.AutoModelForCausalLM.from_config(make_families.config_of("hrm_text")).save_pretrained(folder)
model = streaming.StreamedModel(folder)
try:
    with torch.inference_mode():
        model.to_the_head([model.batch(ids)], lambda *step: None)
except JobError as error:
    answers["hrm_text"] = str(error)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(root, tmp_path_factory):
    command = [ensure(root, "reference").python, "-c", RUN, tmp_path_factory.mktemp("families"), *FAMILIES]
    variables = worker_environment(1)
    variables["PYTHONPATH"] = f"{root / 'tests' / 'support'}:{variables['PYTHONPATH']}"
    done = subprocess.run(command, check=False, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("limit", [0, 2**31], ids=["emptied", "kept"])
def test_part_by_part_a_family_has_the_logits_of_the_whole_model(answers, family, limit):
    answer = answers[f"{family} {limit}"]
    assert answer["equal"], answer
    assert answer["other batch"] < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_computes_once_in_the_models_order(answers, family):
    answer = answers[f"{family} 0"]
    assert answer["computed"] == answer["parts"][:-1]
    assert len(answer["parts"]) == 4  # embeddings, two layers, output layer


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weights_of_a_part_stay_but_embeddings_that_are_read_again(answers, family):
    again = [answers[f"{family} 0"]["parts"][0]] if family == "gemma4_text" else []
    assert answers[f"{family} 0"]["filled"] == again
    assert len(answers[f"{family} {2**31}"]["filled"]) == 4


def test_a_family_that_runs_a_layer_twice_is_refused(answers):
    assert "HrmTextForCausalLM runs model.L_module.layers.0 more than once in a pass" in answers["hrm_text"]
