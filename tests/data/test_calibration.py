from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sections
from hub_server import COMMIT, Hub, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from pydantic import ValidationError
from text_files import parquet
from tiny_model import CHAT_TEMPLATE, SENTENCES, VOCAB_SIZE, write_config, write_model

from quantline.config.data import CalibrationConfig, SourceConfig
from quantline.core.errors import ConfigError, UserError
from quantline.data import documents, hub
from quantline.data.calibration import build, load, tokens_sha256
from quantline.data.sampling import draw, shares
from quantline.data.tokenizer import TextEncoder
from quantline.pipeline.config import parse

EOS = 0  # the tiny tokenizer's first special token
TEXTS = [f"{SENTENCES[index % 3]} {index}" for index in range(40)]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("chat"), chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def tokenizer(model):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(model))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "artifacts" / "calibration"


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def text_file(tmp_path):
    return write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


def spec(*sources, n_samples=4, seq_len=16, **options):
    named = [("own", {"path": str(source)}) if isinstance(source, Path) else source for source in sources]
    return sections.calibration(dict(named), n_samples=n_samples, seq_len=seq_len, **options)


def documents_in_order(rows, seed, name="own"):
    return [rows[index] for index in sorted(range(len(rows)), key=lambda index: draw(seed, name, index + 1))]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- what comes out


def stream_of(tokenizer, rows, seed, seq_len, rounds):
    """The stream of packing `concat`, piece by piece."""
    order = sorted(range(len(rows)), key=lambda index: draw(seed, "own", index + 1))
    stream = []
    for rank in range(rounds):
        for index in order:
            ids = ids_of(tokenizer, rows[index])
            pieces = [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
            if rank < len(pieces):
                stream += pieces[(draw(seed, "own", index + 1, "piece") + rank) % len(pieces)] + [EOS]
    return stream


def in_final_order(stream, seed, n_samples, seq_len):
    order = sorted(range(n_samples), key=lambda index: draw(seed, "sample", "own", index))
    return [stream[index * seq_len : (index + 1) * seq_len] for index in order]


def test_concat_joins_shuffled_documents_with_separators_and_cuts_samples(model, tokenizer, text_file, out):
    report = build(model, spec(text_file, seed=7, seq_len=40), out)
    stream = [token for text in documents_in_order(TEXTS, 7) for token in [*ids_of(tokenizer, text), EOS]]
    ids, manifest = load(out)
    assert ids.dtype == np.int32
    assert ids.tolist() == in_final_order(stream, 7, 4, 40)
    assert report["total_tokens"] == 160
    assert manifest["separator_id"] == EOS


def test_long_documents_give_one_piece_each_before_any_gives_a_second(model, tokenizer, tmp_path, out):
    rows = [" ".join(TEXTS[:20]), TEXTS[20], " ".join(TEXTS[21:30]), TEXTS[31]]
    path = write_rows(tmp_path / "rows.jsonl", [{"text": row} for row in rows])
    one_round = stream_of(tokenizer, rows, 5, 16, rounds=1)
    for n_samples, rounds in ((len(one_round) // 16, 1), (12, 99)):
        report = build(model, spec(path, n_samples=n_samples, seed=5), out)
        stream = stream_of(tokenizer, rows, 5, 16, rounds)
        assert load(out)[0].tolist() == in_final_order(stream, 5, n_samples, 16)
    assert report["sources"]["own"]["documents_used"] == 4


def test_document_packing_takes_one_window_of_each_long_document(model, tokenizer, tmp_path, out):
    rows = ["short", " ".join(TEXTS[:5]), " ".join(TEXTS[5:10]), "brief"]
    path = write_rows(tmp_path / "rows.jsonl", [{"text": row} for row in rows])
    report = build(model, spec(path, n_samples=2, packing="document", seed=3), out)
    windows = []
    for line in (2, 3):
        ids = ids_of(tokenizer, rows[line - 1])
        start = draw(3, "own", line, "window") % (len(ids) - 15)
        windows.append(ids[start : start + 16])
    assert sorted(load(out)[0].tolist()) == sorted(windows)
    assert report["sources"]["own"]["documents_used"] == 2
    assert report["sources"]["own"]["documents_short"] <= 2


def test_equal_inputs_give_equal_bytes_in_any_folder(model, text_file, tmp_path, out):
    build(model, spec(text_file), out)
    moved = tmp_path / "elsewhere" / text_file.name
    moved.parent.mkdir()
    moved.write_bytes(text_file.read_bytes())
    build(model, spec(moved), tmp_path / "second")
    for name in ("tokens.safetensors", "manifest.json"):
        assert (out / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "tokens.safetensors"]
    assert str(tmp_path) not in (out / "manifest.json").read_text()


def test_the_seed_changes_the_samples(model, text_file, tmp_path):
    hashes = {build(model, spec(text_file, seed=seed), tmp_path / "out")["input_ids_sha256"] for seed in (0, 1, 2)}
    assert len(hashes) == 3


def test_more_samples_begin_with_the_same_documents(model, text_file, tmp_path):
    few, many = (
        build(model, spec(text_file, n_samples=n), tmp_path / "out") and load(tmp_path / "out") for n in (2, 6)
    )
    assert {tuple(row) for row in few[0].tolist()} <= {tuple(row) for row in many[0].tolist()}


def test_the_hash_of_the_ids_covers_dtype_shape_and_bytes():
    ids = np.array([[1, 2], [3, 4]], dtype=np.int32)
    expected = hashlib.sha256(b"int32 2x2\n" + bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0])).hexdigest()
    assert tokens_sha256(ids) == expected
    assert tokens_sha256(ids.reshape(1, 4)) != expected


def test_the_manifest_counts_and_identifies(model, text_file, out):
    manifest = build(model, spec(text_file), out)
    own = manifest["sources"]["own"]
    assert (own["file"], own["samples"], own["documents_read"], own["tokens"]) == ("texts.jsonl", 4, 40, 64)
    assert own["file_sha256"] == hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert manifest["options"]["seq_len"] == 16
    assert len(manifest["tokenizer_sha256"]) == 64


def test_draw_is_the_head_of_a_sha256():
    assert draw(0, "own", 1) == int(hashlib.sha256(b"0/own/1").hexdigest()[:16], 16)


def test_shares_go_by_largest_remainder():
    assert shares({"a": 1.0, "b": 1.0, "c": 1.0}, 4) == {"a": 2, "b": 1, "c": 1}
    assert shares({"a": 0.5, "b": 0.3, "c": 0.2}, 8) == {"a": 4, "b": 2, "c": 2}  # exact 4, 2.4, 1.6
    assert shares({"a": 1.0, "b": 0.0}, 3) == {"a": 3, "b": 0}


def test_a_mix_takes_each_source_by_its_weight(model, text_file, tmp_path, out):
    other = write_rows(tmp_path / "other.jsonl", [{"body": {"parts": ["0 1 2 3", text]}} for text in TEXTS])
    sources = (
        ("a", {"weight": 3.0, "path": str(text_file)}),
        ("b", {"weight": 1.0, "path": str(other), "text_field": "body.parts"}),
        ("c", {"weight": 1e-9, "path": "not/read"}),
    )
    report = build(model, spec(*sources, n_samples=8), out)
    assert {name: source["samples"] for name, source in report["sources"].items()} == {"a": 6, "b": 2}


def test_only_the_first_rows_are_read_of_a_large_source(model, text_file, out, monkeypatch):
    monkeypatch.setattr("quantline.data.calibration.MAX_DOCUMENTS", 10)
    assert build(model, spec(text_file), out)["sources"]["own"]["documents_read"] == 10


def test_tampered_tokens_are_found_on_loading(model, text_file, out):
    build(model, spec(text_file), out)
    content = bytearray((out / "tokens.safetensors").read_bytes())
    content[-4] ^= 1
    (out / "tokens.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"does not match manifest\.json"):
        load(out)
    (out / "tokens.safetensors").unlink()
    with pytest.raises(UserError, match="run the stage calibrate again"):
        load(out)


# --- chat


def test_rows_are_rendered_through_the_chat_template_without_separators(chat_model, tokenizer, tmp_path, out):
    messages = [{"role": "user", "content": "a model"}, {"role": "assistant", "content": "a fox"}]
    rows = [{"messages": messages}, {"text": "numbers 0 1 2"}] * 8
    path = write_rows(tmp_path / "chats.jsonl", rows)
    build(chat_model, spec(path, chat_template=True, n_samples=1, seq_len=64), out)
    rendered = ["<|user|>a model<|end|><|assistant|>a fox<|end|>", "<|user|>numbers 0 1 2<|end|>"] * 8
    stream = ids_of(tokenizer, "".join(documents_in_order(rendered, 0)))
    assert load(out)[0].tolist() == [stream[:64]]


def test_messages_without_the_chat_template_name_the_option(chat_model, tmp_path, out):
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    with pytest.raises(UserError, match=r"chats\.jsonl:1: is a conversation; set calibration\.chat_template=true"):
        build(chat_model, spec(path), out)


def test_conversations_of_sharegpt_give_the_tokens_of_the_same_messages(chat_model, tmp_path, out):
    said = [("a model", "a fox"), ("numbers 0 1 2", "the dog")] * 8
    names = ({"role": "user"}, {"role": "assistant"}), ({"from": "human"}, {"from": "gpt"})
    files = []
    for (asks, answers), text in zip(names, ("content", "value"), strict=True):
        turns = [[{**asks, text: question}, {**answers, text: answer}] for question, answer in said]
        key = "messages" if text == "content" else "conversations"
        files.append(write_rows(tmp_path / f"{key}.jsonl", [{key: turn} for turn in turns]))
    for path in files:
        build(chat_model, spec(path, chat_template=True, n_samples=2, seq_len=64), out.with_name(path.stem))
    first, second = (load(out.with_name(path.stem))[0] for path in files)
    assert first.tolist() == second.tolist()


def test_nulls_are_the_empty_rows_that_skip_empty_skips(model, tmp_path, out):
    path = write_rows(tmp_path / "nulls.jsonl", [{"text": None}, *({"text": text} for text in TEXTS)])
    with pytest.raises(UserError, match=r"1 of 41 rows are empty \(lines 1\); .*calibration\.skip_empty=true"):
        build(model, spec(path), out)
    assert build(model, spec(path, skip_empty=True), out)["sources"]["own"]["documents_empty"] == 1


WORDS = some.text(some.characters(), max_size=20)  # halves of surrogate pairs among them
ANY = some.none() | some.booleans() | WORDS | some.lists(WORDS, max_size=2)
MESSAGE = some.dictionaries(some.sampled_from(["role", "content", "from", "value", "name", "tool_calls"]), ANY)
ROW = some.fixed_dictionaries({}, optional={"text": ANY, "messages": some.lists(MESSAGE, max_size=3), "id": ANY})


@given(rows=some.lists(ROW, min_size=1, max_size=5), chat=some.booleans(), skip=some.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_give_samples_or_a_refusal_and_nothing_half_written(chat_model, tmp_path, rows, chat, skip):
    path = write_rows(tmp_path / "any.jsonl", rows)
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        build(chat_model, spec(path, chat_template=chat, skip_empty=skip, n_samples=1, seq_len=8), out)
    except UserError:
        assert sorted(tmp_path.iterdir()) == [path]
    else:
        assert load(out)[0].shape == (1, 8)


def test_a_tokenizer_without_chat_template_is_refused(model, text_file, out):
    with pytest.raises(UserError, match="has no chat template"):
        build(model, spec(text_file, chat_template=True), out)


def test_a_row_that_the_template_refuses_is_named(tmp_path, text_file, out):
    strict = write_model(tmp_path / "strict", chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        UserError, match=r"texts\.jsonl:\d+: the chat template rejects this row \(roles must alternate\)"
    ):
        build(strict, spec(text_file, chat_template=True), out)


# --- refusals


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"text": "a"}', '{"text": '], r"bad\.jsonl:2: is not valid JSON"),
        (["[1]"], r"bad\.jsonl:1: is a JSON int"),
        (
            ['{"body": "a"}'],
            r"bad\.jsonl:1: has neither text nor messages nor conversations \(it has body\); set text_field",
        ),
        (['{"text": 3}'], r"bad\.jsonl:1: text is a int"),
        (['{"messages": [{"role": "user"}]}'], r"bad\.jsonl:1: messages must be a list of objects"),
        (['{"text": "a"}', "", '{"text": " "}'], r"2 of 3 rows are empty \(lines 2, 3\).*calibration\.skip_empty=true"),
        ([], r"has no text \(0 rows, 0 of them empty\)"),
        (['{"text": "a"}'], r"1 documents give 0; lower calibration\.n_samples"),
    ],
)
def test_unusable_rows_are_refused_by_file_and_line(model, tmp_path, out, lines, words):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=words):
        build(model, spec(path), out)
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_empty_rows_are_skipped_and_counted_on_request(model, tmp_path, out):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in ["", *TEXTS, "  "]])
    own = build(model, spec(path, skip_empty=True), out)["sources"]["own"]
    assert (own["documents_empty"], own["documents_read"]) == (2, 42)


def test_a_file_of_empty_rows_is_refused_even_when_they_may_be_skipped(model, tmp_path, out):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": ""}] * 3)
    with pytest.raises(UserError, match=r"has no text \(3 rows, 3 of them empty\)"):
        build(model, spec(path, skip_empty=True), out)


def test_too_little_text_says_how_many_samples_there_are(model, text_file, out):
    with pytest.raises(UserError, match=r"1000 samples of 16 tokens.*40 documents give \d+; lower calibration"):
        build(model, spec(text_file, n_samples=1000), out)


def test_too_few_long_documents_are_counted(model, text_file, out):
    with pytest.raises(UserError, match=r"0 of its 40 documents are that long, 40 are shorter.*packing=concat"):
        build(model, spec(text_file, seq_len=64, packing="document"), out)


def test_samples_longer_than_the_model_takes_are_refused(model, text_file, out):
    with pytest.raises(UserError, match=r"calibration\.seq_len=65: the model takes at most 64 tokens"):
        build(model, spec(text_file, seq_len=65), out)


def test_all_faults_of_the_options_are_named_together(composed):
    given = ("n_samples=0", "seq_len=0", "packing=zip", "sources.demo.weight=-1.0")
    with pytest.raises(ConfigError) as info:
        parse(composed(*(f"calibration.{option}" for option in given)))
    assert not [option for option in given if f"calibration.{option}: " not in str(info.value)]
    assert len(info.value.faults) == len(given)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 0.0])
def test_a_weight_is_a_finite_number_above_zero(weight):
    with pytest.raises(ValidationError, match="weight"):
        sections.calibration({"a": {"path": "x", "weight": weight}})


def test_a_missing_own_file_names_the_option(model, out):
    with pytest.raises(ConfigError, match=r"give calibration\.path=FILE"):
        build(model, spec(("jsonl", {})), out)
    with pytest.raises(UserError, match=r"own\.path=no/such\.jsonl: does not exist"):
        build(model, spec(("own", {"path": "no/such.jsonl"})), out)


def test_ids_beyond_the_models_vocabulary_are_refused(tmp_path, text_file, out):
    small = write_model(tmp_path / "small")
    write_config(small, vocab_size=50)
    with pytest.raises(UserError, match=r"gives id \d+, but the model's vocabulary has 50"):
        build(small, spec(text_file), out)


def test_a_tokenizer_file_is_taken_as_it_stands(model, text_file, out, tokenizer):
    # The class that stands for config.json's model type would split texts in its own way and add a token.
    encoded = TextEncoder.load(model, chat=False).encode([documents.Document(1, TEXTS[1])], text_file)
    assert encoded == [tokenizer.backend_tokenizer.encode(TEXTS[1], add_special_tokens=False).ids]
    assert len(TextEncoder.load(model, chat=False).tokenizer) == VOCAB_SIZE


def test_a_model_without_tokenizer_is_refused(tmp_path, text_file, out):
    (tmp_path / "bare").mkdir()
    write_config(tmp_path / "bare")
    with pytest.raises(UserError, match=r"has no tokenizer; add one of tokenizer\.json"):
        build(tmp_path / "bare", spec(text_file), out)


def test_an_old_result_survives_a_refusal(model, text_file, out):
    first = build(model, spec(text_file), out)
    with pytest.raises(UserError):
        build(model, spec(text_file, n_samples=1000), out)
    assert load(out)[1]["input_ids_sha256"] == first["input_ids_sha256"]


# --- the hub


@pytest.fixture
def served(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    files = {"data/train.parquet": parquet([{"body": text} for text in TEXTS])}
    with serving(Hub({("datasets", "owner/texts"): files})) as state:
        monkeypatch.setenv("HF_ENDPOINT", state.address)
        yield state


HUB_SOURCE = {
    "repo": "owner/texts", "revision": COMMIT, "file": "data/train.parquet", "format": "parquet", "text_field": "body",
}  # fmt: skip


def test_a_data_set_of_the_hub_is_fetched_at_its_commit_and_cached(served, model, out, monkeypatch):
    report = build(model, spec(("code", HUB_SOURCE)), out)
    assert {key: report["sources"]["code"][key] for key in ("repo", "revision", "file")} == {
        "repo": "owner/texts",
        "revision": COMMIT,
        "file": "data/train.parquet",
    }
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert build(model, spec(("code", HUB_SOURCE)), out)["input_ids_sha256"] == report["input_ids_sha256"]


def test_a_local_file_takes_the_place_of_the_hubs(served, model, text_file, out):
    report = build(model, spec(("code", {**HUB_SOURCE, "path": str(text_file)})), out)
    assert report["sources"]["code"]["file"] == "texts.jsonl"
    assert not served.requests


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"revision": "main"}, rf"main is not a commit.*set calibration\.sources\.code\.revision={COMMIT}"),
        ({"repo": "owner/none"}, r"calibration\.sources\.code\.path=FILE"),
        ({"file": "none.parquet"}, r"no such file: check calibration\.sources\.code\.file"),
        ({"text_field": "text"}, r"has no column text \(it has body\)"),
    ],
)
def test_faults_of_a_hubs_source_name_its_options(served, model, out, change, words):
    with pytest.raises(UserError, match=words):
        build(model, spec(("code", {**HUB_SOURCE, **change})), out)


def test_what_is_held_back_comes_from_the_rest_of_the_text_and_changes_no_sample(model, text_file, tmp_path):
    from quantline.checkpoints.safetensors_file import SafetensorsFile

    plain = build(model, spec(text_file), tmp_path / "plain")
    for count, exactly in ((3, 3), (10_000, None)):
        made = build(model, spec(text_file, held_back=count), tmp_path / str(count))
        assert made["input_ids_sha256"] == plain["input_ids_sha256"]
        held = SafetensorsFile.open(tmp_path / str(count) / "tokens.safetensors").read("held_ids")
        assert held.shape == (made["held_back"], 16)
        assert 0 < len(held) <= count
        assert exactly is None or len(held) == exactly
        seen = {tuple(row) for row in load(tmp_path / "plain")[0]}
        assert not seen & {tuple(row) for row in held}


# --- conf/ and the embedded demo


def test_every_calibration_option_has_the_same_keys_and_pinned_sources(root):
    import yaml

    found = {path.stem: yaml.safe_load(path.read_text()) for path in (root / "conf/calibration").glob("*.yaml")}
    assert {"demo", "wikitext2", "c4", "pileval", "jsonl", "domain"} <= set(found)
    for name, values in found.items():
        assert set(values) == set(CalibrationConfig.model_fields)
        assert values["name"] == name
        for source in values["sources"].values():
            assert set(source) == set(SourceConfig.model_fields)
            assert source["format"] is None or source["format"] in documents.FORMATS
            assert source["path"] or hub.COMMIT.fullmatch(source["revision"])
    assert found["jsonl"]["sources"]["jsonl"]["path"] == "${calibration.path}"
    assert len(found["domain"]["sources"]) == 4


def test_the_embedded_demo_calibrates_with_its_default_options(root, out):
    import yaml

    if not (root / "assets/demo/model/tokenizer.json").is_file():
        pytest.skip("the demo model is not built yet")
    values = yaml.safe_load((root / "conf/calibration/demo.yaml").read_text())
    path = root / values["sources"]["demo"]["path"]
    report = build(
        root / "assets/demo/model", spec(path, n_samples=values["n_samples"], seq_len=values["seq_len"]), out
    )
    assert load(out)[0].shape == (values["n_samples"], values["seq_len"])
    assert report["sources"]["own"]["documents_read"] > 100


def test_the_tiny_tokenizer_is_what_these_tests_say(tokenizer):
    assert tokenizer.eos_token_id == EOS
    assert len(tokenizer) <= VOCAB_SIZE
