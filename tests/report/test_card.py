"""The card says what the results say, and no more."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import report_records
import yaml

from quantline.core.errors import UserError
from quantline.data.licence import Licence
from quantline.report import card as cards

TOKEN = "hf_secretSECRETsecret"  # planted, to be found nowhere
PLACE = "/home/someone/models/secret-place"


@pytest.fixture
def variant(tmp_path, composed, monkeypatch):
    """A record by its name, with a configuration of conf/; its licence is known."""
    monkeypatch.setattr(
        cards, "licence_of", lambda model, files: Licence("apache-2.0", said_by=f"the card of {model.repo}")
    )

    def made(name="gptq-w4-g128", *overrides, whole=True):
        chosen = overrides or ("model=qwen2_5_0_5b", "method=gptq", "bits=4", "calibration=wikitext2")
        (record,) = [one for one in report_records.records(tmp_path, whole=whole, names=[name]) if one.name == name]
        report_records.write(tmp_path / "artifacts" / name / "convert" / "conversion_proof.json",
                             {"target": "gptq", "counts": {"linears": 24, "carried_tensors": 98}})  # fmt: skip
        values = {key: value for key, value in composed(*chosen).items() if key != "hydra"}
        results = [{**result, "output_hash": f"hash-of-{result['stage']}"} for result in record.results]
        for result in results:
            if result["stage"] == "serve_smoke":
                result["environment"] = {"device": "cpu", "versions": {"vllm": "0.32.0"}}
        return replace(record, config=values, results=results)

    return made


def read(text):
    header, body = text.removeprefix("---\n").split("\n---\n", 1)
    return yaml.safe_load(header), body


def test_the_header_files_the_model_under_its_base_its_licence_and_what_it_is(variant):
    header, _ = read(cards.card_of(variant(), model="me/tiny-gptq", faults=[]))
    assert header == {
        "base_model": "Qwen/Qwen2.5-0.5B-Instruct", "base_model_relation": "quantized", "license": "apache-2.0",
        "library_name": "vllm", "pipeline_tag": "text-generation", "tags": ["quantline", "gptq", "4-bit", "vllm"],
    }  # fmt: skip


def test_the_card_says_where_it_comes_from_how_good_it_is_and_how_it_is_served(variant):
    _, body = read(cards.card_of(variant(), model="me/tiny-gptq", faults=[], run_id="abc123"))
    for said in (
        "`Qwen/Qwen2.5-0.5B-Instruct` at commit `7ae557604adf67be50417f59c2c2f167def9a775`",
        "apache-2.0, as the card of Qwen/Qwen2.5-0.5B-Instruct says", "GPTQ with 4 bits, groups of 128",
        "128 samples of 512 tokens from `wikitext2` (`Salesforce/wikitext` at",
        "67 251 tokens of 186 documents. Intervals are of 95 %", "| perplexity growth | +2.21 % [+2.04, +2.37] |",
        "| weights on disk | 7.33 MB |", "codes and zero points of 24 linears equal",
        "vllm serve me/tiny-gptq --dtype float16", "--max-model-len 1024", "By this line vLLM 0.32.0 on cpu served it",
        "It passes every gate", "MLflow run `abc123`", "`hash-of-convert`", "KL from float, nats/token",
    ):  # fmt: skip
        assert said in body, body


def test_the_line_names_no_longer_context_than_the_model_takes(variant, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "max_position_embeddings": 700}))
    text = cards.card_of(replace(variant(), outputs={"convert": tmp_path}), model=".", faults=[])
    assert "--max-model-len 700 " in text


def test_what_was_not_measured_is_said_so_and_failed_gates_stand_in_the_card(variant):
    record = variant(whole=False)
    record = replace(record, results=[one for one in record.results if one["stage"] not in ("evaluate", "serve_smoke")])
    header, body = read(cards.card_of(record, model=".", faults=["evaluate: has no up-to-date result; run `x=/a/b`"]))
    assert "library_name" not in header
    assert "Not measured: the variant was not evaluated." in body
    assert "It was not served: serving was not tried." in body
    assert "It FAILS these gates of promotion: evaluate: has no up-to-date result\n" in body
    assert "vllm serve" not in body


def test_a_variant_that_is_not_served_has_its_reason_in_the_place_of_a_command(variant):
    _, body = read(cards.card_of(variant("gptq-w8-g128"), model=".", faults=[]))
    assert f"It was not served: {report_records.REFUSED}" in body
    assert "vllm serve" not in body


def test_alarms_are_told_in_full(variant):
    _, body = read(cards.card_of(variant("gptq-w2-g128"), model=".", faults=[]))
    assert "Alarms:\n- model.layers.4.mlp.down_proj: its output error is beyond what 2 bits explain" in body


def test_a_model_of_a_folder_has_no_base_on_the_hub_and_no_path_or_token_in_its_card(variant, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(cards, "licence_of", lambda model, files: Licence())
    record = variant("gptq-w4-g128", "model=custom", f"model.path={PLACE}/tiny", "method=gptq", "calibration=jsonl",
                     f"calibration.path={PLACE}/text.jsonl", f"evaluate.path={PLACE}/eval.jsonl")  # fmt: skip
    text = cards.card_of(record, model=".", faults=[f"served: {TOKEN}"])
    header, body = read(text)
    header, body = read(text)
    assert (header.get("base_model"), header["license"]) == (None, "unknown")
    assert "**Base model**: `tiny`, a folder" in body
    assert "**Licence**: not known" in body
    assert TOKEN not in text
    assert "someone" not in text


def test_the_float_model_has_no_card(variant):
    with pytest.raises(UserError, match="is the float model itself; give a quantized variant"):
        cards.card_of(variant("gptq-w4-g128", "method=float"), model=".", faults=[])


def test_equal_results_give_equal_cards(variant):
    one, two = (cards.card_of(variant(), model=".", faults=[]) for _ in range(2))
    assert one == two
