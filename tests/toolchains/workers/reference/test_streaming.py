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
    "gemma4_shared": "layers leave keys and values for later ones",
    "ctrl": "scales the embeddings in place",
    "zamba2": "layers share weights, and read the embeddings again",
    "opt_projected": "a projection before the layers, and one behind them",
}
# Those that read the embeddings again, which therefore stay filled.
AGAIN = ("gemma4_text", "gemma4_shared", "zamba2")

RUN = """
import json, sys
from pathlib import Path
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from quantline.toolchains.protocol import JobError
from quantline.checkpoints import model_parts
from quantline.toolchains.workers.reference import streaming
from quantline.toolchains.workers.reference.generating import continue_greedily
from quantline.toolchains.workers.reference.restoring import Restoring
from quantline.toolchains.workers.reference.scoring import Scoring
from quantline.toolchains.workers.reference.skeleton import attention_of
import make_families

def config_of(family):
    config = make_families.config_of(family.partition("_")[0] if family == "opt_projected" else
        {"gemma4_shared": "gemma4_text", "ctrl": "gpt2", "zamba2": "llama"}.get(family, family))
    if family == "gemma4_shared":
        config = type(config)(**{**config.to_dict(), "num_hidden_layers": 4, "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2})
    if family == "opt_projected":
        config.word_embed_proj_dim = 64
    if family == "ctrl":
        config = transformers.CTRLConfig(vocab_size=320, n_positions=512, n_embd=128, dff=256, n_layer=2, n_head=4)
    if family == "zamba2":
        config = transformers.Zamba2Config(vocab_size=320, hidden_size=128, num_hidden_layers=4, intermediate_size=256,
            layers_block_type=["mamba", "hybrid"] * 2, num_attention_heads=4, num_key_value_heads=4, n_mamba_heads=4,
            mamba_headdim=64, mamba_d_state=16, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    return config

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
ids = np.random.default_rng(0).integers(0, 256, (3, 24))
answers = {}
for family in sys.argv[2:]:
    folder = Path(sys.argv[1]) / family
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config_of(family))
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
            model_parts.KEEP_BYTES = limit
            model = streaming.StreamedModel(folder)
            batches, progress = [model.batch(ids), model.batch(ids[:2])], []
            model.to_the_head(batches, lambda *step: progress.append(step))
            logits = [model.logits(batch) for batch in batches]
            model.release()
            filled = model.skeleton.filled
            tokens, _ = continue_greedily(model, ids[:2].tolist(), 4, lambda *step: None)
            model.release()
            answers[f"{family} {limit}"] = {
                "equal": bool(torch.equal(logits[0], expected)), "apart": float((logits[0] - expected).abs().max()),
                "other batch": float((logits[1] - expected[:48]).abs().max()), "filled": filled, "tokens": tokens.tolist(),
                "parts": list(model.skeleton.parts), "computed": [label for _, _, label in progress[::2]],
            }
PUT_BACK = {"opt_projected": ("model.decoder.project_in", "model.decoder.project_out", "model.decoder.layers.1.fc1"),
    "zamba2": ("model.layers.1.shared_transformer.self_attn.k_proj", "model.layers.2.mamba.in_proj"), "llama": ("lm_head",)}
for family, names in PUT_BACK.items():
    folder = Path(sys.argv[1]) / family
    for name in names:
        other = Path(sys.argv[1]) / f"{family}-{name}"
        other.mkdir()
        (other / "config.json").write_text((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + 0.05 * torch.randn_like(tensors[f"{name}.weight"])
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        with torch.inference_mode():
            own, base = streaming.StreamedModel(other), streaming.StreamedModel(folder)
            windows = {"input_ids": ids.reshape(-1).astype(np.int32), "offsets": np.arange(4) * 24}
            scoring = Scoring(own, base, 48)
            restoring = Restoring(own, base, scoring.windows(windows), 72, [name], folded=False)
            scores = scoring.score(72, scoring.windows(windows), lambda *step: None, restoring)
        rows, found = restoring.result()
        kl = [float(np.nanmax(row)) for row in found["kl"]]
        answers[name] = {"rows": rows, "kl": kl, "same": bool(np.array_equal(found["kl"][0], scores.kl, equal_nan=True))}
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
    assert len(answer["parts"]) >= 4  # embeddings, layers, output layer


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weights_of_a_part_stay_but_embeddings_that_are_read_again(answers, family):
    again = [answers[f"{family} 0"]["parts"][0]] if family in AGAIN else []
    assert answers[f"{family} 0"]["filled"] == again
    assert len(answers[f"{family} {2**31}"]["filled"]) == len(answers[f"{family} 0"]["parts"])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_emptied_model_continues_as_one_that_keeps_its_weights(answers, family):
    assert answers[f"{family} 0"]["tokens"] == answers[f"{family} {2**31}"]["tokens"]


@pytest.mark.parametrize(
    "name",
    ["model.decoder.project_in", "model.decoder.project_out", "model.decoder.layers.1.fc1", "lm_head",
     "model.layers.1.shared_transformer.self_attn.k_proj", "model.layers.2.mamba.in_proj"],
)  # fmt: skip
def test_a_linear_that_is_all_that_differs_is_put_back_wherever_it_is(answers, name):
    found = answers[name]
    assert found["rows"] == [{"name": name, "tensor": 1, "note": ""}]
    assert found["same"]
    assert found["kl"][0] > 1e-3
    assert found["kl"][1] == 0.0


def test_a_family_that_runs_a_layer_twice_is_refused(answers):
    assert "HrmTextForCausalLM runs model.L_module.layers.0 more than once in a pass" in answers["hrm_text"]
