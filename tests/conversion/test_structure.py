"""A checkpoint whose tensors are not those of its config.json is refused, or the proof says that nobody compared them."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import shutil
import subprocess

import numpy as np
import pytest
from tiny_quantized import write_whole

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.config.convert import ConvertConfig
from quantline.conversion import structure
from quantline.conversion.convert import convert
from quantline.conversion.structure import Held, misfits
from quantline.core.errors import QuantlineError, UserError
from quantline.quantization.capabilities import claimed_families
from quantline.toolchains.environments import ensure

HIDDEN, INNER, ROWS = 64, 128, 300
NORMS = ("input_layernorm", "post_attention_layernorm")


def header_of(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put_header(path, header, data):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def changed(folder, tensor, **changes):
    path = folder / "model.safetensors"
    header, data = header_of(path)
    entry = header.pop(tensor)
    header[changes.pop("name", tensor)] = {**entry, **changes}
    put_header(path, header, data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_whole(tmp_path_factory.mktemp("whole") / "gptq", "gptq_v2")


LAYER = "model.layers.0."


@pytest.mark.parametrize(
    ("tensor", "changes", "message"),
    [
        (f"{LAYER}self_attn.q_proj.bias", {"name": f"{LAYER}self_attn.q_proj.biasx"}, "self_attn.q_proj.bias"),
        (f"{LAYER}self_attn.q_proj.bias", {"name": "MODEL.LAYERS.0.SELF_ATTN.Q_PROJ.BIAS"}, "named MODEL.LAYERS. and"),
        (f"{LAYER}self_attn.q_proj.bias", {"shape": [128, 1]}, "its linear has 128 outputs"),
        (f"{LAYER}input_layernorm.weight", {"shape": [128, 1]}, r"has shape \(128,\), layer 0 has \(128, 1\)"),
        (f"{LAYER}input_layernorm.weight", {"dtype": "BF16"}, "has dtype F16, layer 0 has BF16"),
        (f"{LAYER}input_layernorm.weight", {"dtype": "I16"}, "stored as I16, but parameters are floating-point"),
        (f"{LAYER}input_layernorm.weight", {"name": "model.layers.9.input_layernorm.weight"}, "layer 9"),
        ("model.norm.weight", {"name": "model.nrm.weight"}, "has no such tensor outside its layers"),
        ("model.norm.weight", {"name": "model.norm.bias"}, "model.norm.weight or .*: is missing, the final norm"),
        ("model.norm.weight", {"shape": [1, 128]}, r"config.json says \(128,\)"),
        ("model.embed_tokens.weight", {"shape": [128, 320]}, r"config.json says \(320, 128\)"),
        ("model.embed_tokens.weight", {"dtype": "BF16"}, "stored as BF16, as 1 of"),
        ("lm_head.weight", {"name": "lm_head.weightx"}, "lm_head.weight or embed_out.weight: is missing"),
        ("lm_head.weight", {"name": "../lm_head.weight"}, "is no name of a parameter"),
        (f"{LAYER}mlp.up_proj.scales", {"dtype": "BF16"}, "stored as BF16, as 1 of 14 tensors"),
    ],
)
def test_a_renamed_reshaped_or_retyped_tensor_is_refused_and_nothing_is_written(
    whole, tmp_path, tensor, changes, message
):
    folder, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(whole, folder)
    changed(folder, tensor, **changes)
    for target in ("gptq", "keep"):
        out.mkdir(exist_ok=True)
        with pytest.raises(UserError, match=message):
            convert(folder, out, ConvertConfig(target=target))
        assert list(out.iterdir()) == []


def test_the_proof_says_that_the_architecture_was_not_asked(whole, tmp_path):
    convert(whole, tmp_path, ConvertConfig(target="gptq"))
    entry = json.loads((tmp_path / "conversion_proof.json").read_text())["architecture"]
    assert entry["checked"] is False
    assert "needs the environment reference; its layers were compared with each other" in entry["note"]


def test_of_a_family_that_is_not_known_nothing_is_refused_and_the_proof_says_why(whole, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(whole, folder)
    changed(folder, "model.norm.weight", name="model.nrm.weight")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "brand_new"}))
    (tmp_path / "out").mkdir()
    proof = convert(folder, tmp_path / "out", ConvertConfig(target="gptq"))
    assert "layers of model_type='brand_new' are not known to be alike" in proof.architecture.note


def decoder(count, parts):
    """A model whose layer N has the linears `parts(N)`: name -> shape, besides its norms."""
    tensors = {"model.embed_tokens.weight": (ROWS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for number in range(count):
        own = {f"{name}.weight": (HIDDEN,) for name in NORMS} | parts(number)
        tensors |= {f"model.layers.{number}.{name}": shape for name, shape in own.items()}
    return {name: Held(shape, "F16") for name, shape in tensors.items()}


def config_of(model_type, count, **more):
    return {"model_type": model_type, "num_hidden_layers": count, "hidden_size": HIDDEN, "vocab_size": ROWS, **more}


GOOD = {
    "experts in every second layer": (
        config_of("qwen2_moe", 4, decoder_sparse_step=2),
        lambda n: {"mlp.experts.0.up_proj.weight": (8, HIDDEN)} if n % 2 else {"mlp.up_proj.weight": (INNER, HIDDEN)},
    ),
    "dense layers by name": (
        config_of("qwen3_moe", 3, mlp_only_layers=[0]),
        lambda n: {"mlp.experts.0.up_proj.weight": (8, HIDDEN)} if n else {"mlp.up_proj.weight": (INNER, HIDDEN)},
    ),
    "first layers dense": (
        config_of("glm4_moe", 3, first_k_dense_replace=1),
        lambda n: {"mlp.experts.0.up_proj.weight": (8, HIDDEN)} if n else {"mlp.up_proj.weight": (INNER, HIDDEN)},
    ),
    "convolutions and attention": (
        config_of("lfm2", 3, layer_types=["conv", "conv", "full_attention"]),
        lambda n: {"self_attn.q_proj.weight": (HIDDEN, HIDDEN)} if n == 2 else {"conv.conv.weight": (HIDDEN, 1, 3)},
    ),
    "wider heads in global layers": (
        config_of("gemma4_text", 4, layer_types=["sliding_attention", "full_attention"] * 2),
        lambda n: {"self_attn.q_proj.weight": (HIDDEN * (1 + n % 2), HIDDEN)},
    ),
}


@pytest.mark.parametrize("what", GOOD)
def test_layers_that_differ_as_config_json_says_are_good(what):
    config, parts = GOOD[what]
    assert misfits(config, decoder(config["num_hidden_layers"], parts)) == ([], None)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (config_of("glm4_moe", 2, num_nextn_predict_layers=1), "model.layers.2.eh_proj.weight"),
        (config_of("qwen3_next", 2), "mtp.layers.0.mlp.up_proj.weight"),
    ],
)
def test_layers_that_predict_further_tokens_are_good(config, name):
    further = {name: Held((INNER, HIDDEN), "F16")}
    tensors = decoder(2, lambda n: {"mlp.up_proj.weight": (INNER, HIDDEN)})
    assert misfits(config, {**tensors, **further}) == ([], None)
    assert misfits(config_of("llama", 2), {**tensors, "model.layers.2.eh_proj.weight": further[name]})[0]


def test_linears_that_a_rule_left_float_and_biases_of_quantizers_are_good():
    tensors = decoder(2, lambda n: {"mlp.up_proj.weight": (INNER, HIDDEN)})
    tensors["model.layers.0.mlp.up_proj.weight"] = Held((INNER, HIDDEN), None)
    tensors["model.layers.0.mlp.up_proj.bias"] = Held((INNER,), "F16")
    assert misfits(config_of("llama", 2), tensors) == ([], None)


def test_float16_biases_of_packed_linears_beside_a_bfloat16_model_are_good():
    tensors = decoder(2, lambda n: {"mlp.up_proj.weight": (INNER, HIDDEN)})
    tensors = {name: Held(one.shape, "BF16") for name, one in tensors.items()}
    for number in range(2):
        tensors[f"model.layers.{number}.mlp.up_proj.weight"] = Held((INNER, HIDDEN), None)
        tensors[f"model.layers.{number}.mlp.up_proj.bias"] = Held((INNER,), "F16")
    assert misfits(config_of("qwen2", 2), tensors) == ([], None)


FAMILIES = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, CONFIG_MAPPING
found = {}
for family in sys.argv[1:]:
    more = {"head_dim": 16} if family == "hunyuan_v1_dense" else {}
    config = CONFIG_MAPPING[family](**more)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found[family] = [config.to_dict(), {name: list(tensor.shape) for name, tensor in model.state_dict().items()}]
print(json.dumps(found, default=str))
"""


@pytest.mark.toolchain("reference")
def test_no_family_that_a_backend_claims_is_refused_as_transformers_makes_it(root):
    python = ensure(root, "reference").python
    done = subprocess.run(
        [python, "-c", FAMILIES, *sorted(claimed_families())], capture_output=True, text=True, check=True
    )
    for family, (config, shapes) in json.loads(done.stdout.splitlines()[-1]).items():
        tensors = {name: Held(tuple(shape), "F32") for name, shape in shapes.items()}
        assert misfits(config, tensors) == ([], None), family


VALUES = (
    None,
    -1,
    0,
    2**63,
    1e308,
    float("nan"),
    "",
    "x" * 500,
    [],
    {},
    [[[]]],
    True,
    "../../etc/passwd",
    "\0",
    3.5,
    7,
)


def mutated_json(value, chance):
    if isinstance(value, (dict, list)) and value:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        draw = chance.random()
        if draw < 0.25:
            del value[key]
        elif draw < 0.5 or not isinstance(value[key], (dict, list)):
            value[key] = chance.choice(VALUES)
        else:
            value[key] = mutated_json(value[key], chance)
        return value
    return chance.choice(VALUES)


def mutate(folder, chance):
    weights, config = folder / "model.safetensors", folder / "config.json"
    kind = chance.choice(["json", "header", "name", "shape", "dtype", "offsets", "copy", "cut"])
    if kind == "json":
        config.write_text(json.dumps(mutated_json(json.loads(config.read_text()), chance)))
        return
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[: chance.randrange(weights.stat().st_size)])
        return
    header, data = header_of(weights)
    name = chance.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    if kind == "header":
        header = mutated_json(header, chance)
    elif kind == "name":
        header.pop(name)
        header[chance.choice([f"{name}x", name.upper(), "", name.replace("weight", "bias"), f"a.{name}"])] = entry
    elif kind == "shape":
        entry["shape"] = chance.choice([shape[::-1], [*shape, 1], [math.prod(shape)], [-size for size in shape], []])
    elif kind == "dtype":
        entry["dtype"] = chance.choice(["F32", "F16", "BF16", "I8", "I16", "I32", "BOOL", "X9"])
    elif kind == "offsets":
        entry["data_offsets"] = chance.choice([[start + 2, end + 2], [end, start], [0, end - start], [start, 2**50]])
    else:
        header[name] = copy.deepcopy(chance.choice([header[other] for other in header if other != "__metadata__"]))
    put_header(weights, header, data)


def digest(folder):
    """Of every tensor by name, whatever its place in the file."""
    checkpoint, whole = Checkpoint.open(folder), hashlib.sha256()
    for name in checkpoint.names:
        info = checkpoint.info(name)
        whole.update(repr((name, info.dtype, info.shape)).encode() + np.array(checkpoint.tensor(name)).tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize("target", ["gptq", "keep"])
def test_what_is_damaged_anyhow_is_refused_or_gives_the_same_weights(whole, tmp_path, target):
    """Any other exception fails the test. 60 mutations take 2 s; thousands were tried."""
    chance = random.Random(target)
    (tmp_path / "good").mkdir()
    convert(whole, tmp_path / "good", ConvertConfig(target=target))
    good = digest(tmp_path / "good")
    for _ in range(60):
        folder, out = tmp_path / "in", tmp_path / "out"
        for old in (folder, out):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(whole, folder)
        out.mkdir()
        mutate(folder, chance)
        try:
            convert(folder, out, ConvertConfig(target=target))
        except QuantlineError:
            continue
        assert digest(out) == good


def test_layer_types_of_any_json_are_kinds():
    kinds = structure._kinds({"layer_types": [{"a": []}, "full_attention", {"a": []}]}, 3)
    assert kinds[0] == kinds[2] != kinds[1]
    assert len(dict.fromkeys(kinds)) == 2
