from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sections
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import load_file

from quantline.checkpoints.checkpoint import write_safetensors
from quantline.config.evaluate import PROTOCOL_KEYS, ProtocolConfig
from quantline.core.errors import ConfigError, QuantlineError, UserError
from quantline.core.files import read_json
from quantline.data.windows import (  # fmt: skip
    Windows,
    build_windows,
    cut_documents,
    save_windows,
    some_documents,
    spans,
)
from quantline.evaluation.perplexity import (
    DocumentScore,
    check_engines,
    compare,
    document_nlls,
    evaluation_metrics,
    in_words,
    load_scores,
    perplexity,
    read_documents,
    relative_difference,
    top1_matches,
    weight_bytes,
    write_documents,
)
from quantline.pipeline.config import parse


def protocol(**values: Any) -> ProtocolConfig:
    return sections.protocol(**{"window": 4, "stride": 4, **values})


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose tokenizer makes one token of every ASCII character; `<s>` begins a sequence, id 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": "qwen2", "vocab_size": 257, "max_position_embeddings": 32}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def text_of(windows: Windows, folder: Path) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    return [
        tokenizer.decode(windows.input_ids[begin:end])
        for begin, end in zip(windows.offsets[:-1], windows.offsets[1:], strict=True)
    ]


# Windows


def test_without_overlap_windows_tile_the_document() -> None:
    assert spans(10, 4, 4) == [(0, 4, 0), (4, 8, 0), (8, 10, 0)]


def test_with_overlap_only_new_tokens_are_left_to_score_and_the_last_window_ends_with_the_text() -> None:
    assert spans(10, 4, 2) == [(0, 4, 0), (2, 6, 2), (4, 8, 2), (6, 10, 2)]
    assert spans(9, 4, 2)[-1] == (6, 9, 2)
    assert spans(3, 4, 2) == [(0, 3, 0)]


@given(
    lengths=st.lists(st.integers(2, 40), min_size=2, max_size=4),
    window=st.integers(2, 12),
    stride=st.integers(1, 12),
    bos=st.sampled_from(["none", "add"]),
)
def test_every_token_is_scored_at_most_once_and_only_those_without_context_are_not(
    lengths: list[int], window: int, stride: int, bos: str
) -> None:
    stride = min(stride, window)
    documents = [(str(number), [1000 * number + i for i in range(size)]) for number, size in enumerate(lengths)]
    prefix = [99999] if bos == "add" else []
    windows = cut_documents(documents, protocol(window=window, stride=stride, bos=bos), prefix)
    scored = windows.input_ids[windows.scored].tolist()
    assert len(scored) == len(set(scored))
    assert 99999 not in scored
    everything = {token for _, ids in documents for token in ids}
    if prefix:
        alone: set[int] = set()
    elif stride < window:
        alone = {ids[0] for _, ids in documents}
    else:
        alone = {ids[start] for _, ids in documents for start in range(0, len(ids), window)}
    assert everything - set(scored) == alone
    sizes = np.diff(windows.offsets)
    assert sizes.max() <= window
    assert (windows.context >= 1).all()
    assert (windows.context < sizes).all()
    room = window - len(prefix)
    for begin, end, context in zip(windows.offsets[:-1], windows.offsets[1:], windows.context, strict=True):
        text = windows.input_ids[begin + len(prefix) : end] % 1000  # places in the document
        for before, place in list(enumerate(text))[context - len(prefix) :]:
            assert before >= min(place, room - min(stride, room))


def test_documents_are_cut_one_by_one_with_their_ids(model: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"id": "x/1", "text": "abcdef"}, {"text": " "}, {"id": "y", "text": "ghi"})
    windows = build_windows(model, protocol(path=path))
    assert text_of(windows, model) == ["abcd", "ef", "ghi"]
    assert windows.document_ids == ("x/1", "y")
    assert windows.document.tolist() == [0, 0, 1]
    assert windows.context.tolist() == [1, 1, 1]
    assert (windows.input_ids.dtype, windows.offsets.dtype) == (np.int32, np.int64)


def test_rows_without_an_id_are_named_by_their_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n\n{"text": "def"}\n')
    windows = build_windows(model, protocol(path=str(tmp_path / "a.jsonl")))
    assert windows.document_ids == ("line-000001", "line-000003")


def test_ids_are_known_in_a_file_from_an_editor_on_windows(model: Path, tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"id": "x", "text": "abc"}\r\n{"id": "y", "text": null}\r\n{"id": "z", "text": "def"}\r\n'
    (tmp_path / "A.JSONL").write_bytes(content)
    windows = build_windows(model, protocol(path=str(tmp_path / "A.JSONL")))
    assert windows.document_ids == ("x", "z")


def test_joined_rows_keep_the_empty_ones_and_lose_the_last_partial_window(model: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "abc"}, {"text": ""}, {"text": "def"})
    windows = build_windows(model, protocol(path=path, mode="concatenated"))
    assert text_of(windows, model) == ["abc\n", "\n\n\nd"]
    assert windows.document_ids == ("window-000000", "window-000001")


def test_parquet_rows_are_read_as_they_are(model: Path, tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    parquet.write_table(arrow.table({"text": ["", " = A = \n", "b"]}), tmp_path / "a.parquet")
    windows = build_windows(model, protocol(path=str(tmp_path / "a.parquet"), mode="concatenated"))
    assert text_of(windows, model) == ["\n\n =", " A =", " \n\n\n"]


def test_a_beginning_token_takes_a_place_of_the_window_and_makes_the_first_token_count(
    model: Path, tmp_path: Path
) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "abcdef"}, {"text": "g"})
    windows = build_windows(model, protocol(path=path, bos="add", min_tokens=1))
    assert text_of(windows, model) == ["<s>abc", "<s>def", "<s>g"]
    assert windows.scored.tolist() == [False, True, True, True, False, True, True, True, False, True]


def test_a_window_that_was_not_given_is_one_less_than_the_model_takes_and_is_in_the_record(
    model: Path, tmp_path: Path
) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "abc" * 20}, {"text": "abcd"})
    windows = build_windows(model, protocol(path=path, window="auto", stride="auto"))
    assert np.diff(windows.offsets).tolist() == [31, 29, 4]
    assert (windows.protocol["window"], windows.protocol["stride"]) == (31, 31)
    saved = json.loads(save_windows(windows, tmp_path / "out").with_suffix(".json").read_text())
    assert saved["protocol"]["window"] == 31


def test_limits_cut_documents_and_leave_out_short_ones(model: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"text": text} for text in ("abcdefgh", "ij", "klmnop", "qrst")))
    limits = {"max_document_tokens": 5, "min_tokens": 3, "max_tokens": 8, "window": 8, "stride": 8}
    assert text_of(build_windows(model, protocol(path=path, **limits)), model) == ["abcde", "klm"]
    two = build_windows(model, protocol(path=path, max_documents=2, window=8, stride=8))
    assert text_of(two, model) == ["abcdefgh", "ij"]


@pytest.mark.parametrize(
    ("content", "values", "fact"),
    [
        (None, {}, "does not exist"),
        ("", {}, "has no text"),
        ('{"text": " "}\n', {}, "has no text"),
        ('{"text": "abc"}\n{', {}, r"a\.jsonl:2: is not valid JSON"),
        ('{"body": "abc"}\n', {}, r"a\.jsonl:1: has neither text"),
        ('{"messages": [{"role": "user", "content": "abc"}]}\n{"text": "abc"}\n', {}, "a.jsonl:1: has messages"),
        ('{"text": "abc"}\n', {}, "gives 1 documents"),
        ('{"text": "abcdef"}\n', {"mode": "concatenated"}, "gives 1 full windows"),
        ('{"text": "abc"}\n' * 2, {"window": 64, "stride": 64}, "takes at most 32"),
        ('{"id": 1, "text": "abc"}\n' * 2, {}, "id '1' occurs twice"),
        ('{"text": "abc"}\n{"text": "half \\ud83d"}\n', {}, r"a\.jsonl:2: text has half of a surrogate pair"),
        ('{"id": "\\ud83d", "text": "abc"}\n', {}, r"a\.jsonl:1: id has half of a surrogate pair"),
    ],
)
def test_text_that_cannot_be_evaluated_is_refused_with_the_place(
    model: Path, tmp_path: Path, content: str | None, values: dict[str, Any], fact: str
) -> None:
    if content is not None:
        (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=fact):
        build_windows(model, protocol(path=str(tmp_path / "a.jsonl"), **values))


def test_a_path_of_null_says_what_to_set(model: Path) -> None:
    with pytest.raises(UserError, match=r"set evaluate\.path=FILE"):
        build_windows(model, protocol())


def test_a_tokenizer_without_a_beginning_token_cannot_add_one(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    path = lines(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "def"})
    with pytest.raises(UserError, match="bos=none"):
        build_windows(tmp_path, protocol(path=path, bos="add"))


def test_all_faults_of_a_protocol_are_named_together() -> None:
    with pytest.raises(ValidationError) as caught:
        protocol(mode="pages", bos="maybe", window=1, stride=0, max_tokens=0, min_tokens=0)
    assert len({fault["loc"][0] for fault in caught.value.errors()}) == 6


def test_a_stride_that_leaves_text_out_is_refused(composed: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(
        ConfigError, match=r"evaluate\.stride=513: larger than the window, so text would be skipped; give 1 to 512"
    ):
        parse(composed("evaluate.stride=513"))


def test_saved_windows_hold_everything_and_equal_windows_give_equal_files(model: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "abcdef"}, {"text": "ghi"})
    windows = build_windows(model, protocol(path=path))
    file = save_windows(windows, tmp_path / "one")
    save_windows(build_windows(model, protocol(path=path)), tmp_path / "two")
    for name in ("windows.safetensors", "windows.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    manifest = read_json(tmp_path / "one" / "windows.json")
    assert manifest["sha256"] == windows.sha256
    assert tuple(manifest["document_ids"]) == windows.document_ids
    assert ProtocolConfig(**manifest["protocol"]) == protocol(path=path)
    tensors = load_file(file)
    assert all(np.array_equal(tensors[name], getattr(windows, name)) for name in tensors)
    assert sorted(entry.name for entry in (tmp_path / "one").iterdir()) == ["windows.json", "windows.safetensors"]


def test_the_evaluation_configs_are_whole_protocols(root: Path, composed: Callable[..., dict[str, Any]]) -> None:
    files = sorted((root / "conf" / "evaluate").glob("*.yaml"))
    assert [file.stem for file in files] == ["c4", "perplexity", "wikitext2", "wikitext2_word"]
    for file in files:
        made = parse(composed(f"evaluate={file.stem}")).evaluate
        assert made.name == file.stem
        assert made.level == ("word" if "word" in file.stem else "token")
        stated = set(yaml.safe_load(file.read_text()))
        assert stated == {*PROTOCOL_KEYS, "batch_tokens", "gpus", "bootstrap", "engine_tolerance"}


def test_wikitext_on_the_demo_model_needs_a_shorter_window_and_says_so(
    root: Path, composed: Callable[..., dict[str, Any]]
) -> None:
    text = root.parent / "shared" / "data" / "wikitext2_valid.txt"
    if not text.is_file():
        pytest.skip("no ../shared/data")
    given = ["evaluate=wikitext2", f"evaluate.path={text}"]
    demo = root / "assets" / "demo" / "model"
    with pytest.raises(UserError, match=r"at most 1024 .*set evaluate\.window to that or less"):
        build_windows(demo, parse(composed(*given)).evaluate)
    shorter = parse(composed(*given, "evaluate.window=512", "evaluate.max_tokens=20000")).evaluate
    windows = build_windows(demo, shorter)
    assert set(np.diff(windows.offsets).tolist()) == {512}
    assert len(windows.document_ids) == 20000 // 512
    assert windows.words is not None
    assert windows.text_bytes is not None
    assert 3 < windows.text_bytes.sum() / windows.words.sum() < 8


# Scores

TWO = cut_documents([("a", [0, 1, 2, 3, 4, 5]), ("b", [6, 7, 8])], protocol(), [])  # windows 0123 45 678


def test_the_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary() -> None:
    logprobs = np.full(9, -math.log(257), dtype=np.float32)
    assert perplexity(document_nlls(TWO, logprobs)) == pytest.approx(257, rel=1e-6)


def test_losses_are_summed_over_the_scored_tokens_of_each_document() -> None:
    nan = np.nan
    logprobs = np.array([nan, -1, -2, -4, nan, -8, nan, -16, -32], dtype=np.float32)
    assert document_nlls(TWO, logprobs) == [DocumentScore("a", 15.0, 4), DocumentScore("b", 48.0, 2)]
    assert perplexity(document_nlls(TWO, logprobs)) == pytest.approx(math.exp(63 / 6))


@pytest.mark.parametrize("value", [np.nan, -np.inf, 0.5])
def test_a_scored_token_without_a_probability_is_an_error(value: float) -> None:
    logprobs = np.full(9, -1.0, dtype=np.float32)
    logprobs[2] = value
    with pytest.raises(QuantlineError, match="1 of 6 scored tokens"):
        document_nlls(TWO, logprobs)


def test_log_probabilities_of_other_windows_are_refused() -> None:
    with pytest.raises(QuantlineError, match="other windows"):
        document_nlls(TWO, np.zeros(8, dtype=np.float32))


def scores(*rows: tuple[str, float, int]) -> list[DocumentScore]:
    return [DocumentScore(*row) for row in rows]


BASE = scores(("a", 20.0, 10), ("b", 90.0, 30), ("c", 10.0, 10))


def shifted(amount: float) -> list[DocumentScore]:
    return [DocumentScore(score.id, score.nll_sum + amount * score.tokens, score.tokens) for score in BASE]


def test_a_model_compared_with_itself_is_the_same_to_the_last_bit() -> None:
    result = compare(BASE, BASE, sections.bootstrap())
    assert (result.difference, result.ratio, result.nll_difference) == (0.0, 1.0, 0.0)
    assert (result.low, result.high, result.verdict) == (0.0, 0.0, "same")


@pytest.mark.parametrize(("amount", "verdict"), [(0.125, "worse"), (-0.125, "better")])
def test_a_shift_of_every_token_is_a_verdict_and_the_ratio_is_its_exponential(amount: float, verdict: str) -> None:
    result = compare(shifted(amount), BASE, sections.bootstrap())
    assert result.verdict == verdict
    assert result.nll_difference == pytest.approx(amount)
    assert result.ratio == pytest.approx(math.exp(amount))
    assert result.perplexity / result.baseline_perplexity == pytest.approx(result.ratio)
    assert result.difference == pytest.approx(result.perplexity - math.exp(120 / 50))


def test_differences_that_cancel_are_not_told_apart() -> None:
    other = scores(("a", 22.0, 10), ("b", 88.0, 30), ("c", 10.5, 10))
    assert compare(other, BASE, sections.bootstrap()).verdict == "same"


@pytest.mark.parametrize("other", [BASE[:2], list(reversed(BASE)), scores(("a", 20.0, 11), *[("b", 1.0, 30)])])
def test_only_the_same_documents_and_tokens_are_compared(other: list[DocumentScore]) -> None:
    with pytest.raises(UserError, match="not of the same documents"):
        compare(other, BASE, sections.bootstrap())
    with pytest.raises(UserError, match="not of the same documents"):
        relative_difference(BASE, other)


def test_the_engines_difference_is_relative_signed_and_held_against_the_tolerance() -> None:
    difference = relative_difference(BASE, shifted(math.log(1.02)))
    assert difference == pytest.approx(0.02)
    assert relative_difference(BASE, BASE) == 0.0
    check_engines(difference, 0.0201)
    for beyond in (difference, -difference, math.nan):
        with pytest.raises(QuantlineError, match="engine_tolerance"):
            check_engines(beyond, 0.0199)


def test_agreement_counts_scored_tokens_only() -> None:
    mine = np.array([9, 1, 1, 1, 9, 1, 9, 1, 1], dtype=np.int32)
    theirs = np.array([8, 1, 1, 2, 8, 1, 8, 1, 1], dtype=np.int32)
    matches, places = top1_matches(TWO, mine, theirs)
    assert (matches.tolist(), places.tolist()) == ([3.0, 2.0], [4.0, 2.0])
    with pytest.raises(UserError, match="same windows"):
        top1_matches(TWO, mine, theirs[:5])


def test_metrics_have_the_published_names_and_leave_out_what_was_not_measured() -> None:
    comparison = compare(shifted(0.125), BASE, sections.bootstrap())
    required = {"size_bytes": 100, "float_size_bytes": 400}
    metrics = evaluation_metrics(reference=shifted(0.125), comparison=comparison, **required)
    always = {
        "reference_perplexity", "reference_nll", "perplexity_difference", "perplexity_ratio", "nll_difference",
        "nll_difference_low", "nll_difference_high", "size_bytes", "float_size_bytes", "compression_ratio",
        "tokens_scored", "documents",
    }  # fmt: skip
    assert set(metrics) == always
    assert (metrics["compression_ratio"], metrics["tokens_scored"], metrics["documents"]) == (4.0, 50, 3)
    assert metrics["reference_nll"] == pytest.approx(120 / 50 + 0.125)
    more = evaluation_metrics(
        reference=shifted(0.125), comparison=comparison, **required, vllm=shifted(0.126), windows=TWO
    )
    assert set(more) - always == {"vllm_perplexity", "vllm_nll", "engine_relative_difference"}
    assert more["engine_relative_difference"] == pytest.approx(math.expm1(0.001))


def test_words_and_bytes_are_those_of_the_scored_text(model: Path, tmp_path: Path) -> None:
    # Windows "ab c", "d  e" and "a ä"; the first letter of each is not scored. "d" goes on with the word "c" began.
    path = lines(tmp_path / "a.jsonl", {"text": "ab cd  e"}, {"text": "a ä"})
    windows = build_windows(model, protocol(path=path, window=4, stride=4))
    assert windows.words is not None
    assert windows.text_bytes is not None
    assert windows.words.tolist() == [2, 1]  # "c" and "e"; "ä"
    assert windows.text_bytes.tolist() == [3 + 3, 3]
    assert load_file(save_windows(windows, tmp_path / "saved"))["words"].tolist() == [2, 1]


def test_by_word_and_by_byte_the_same_loss_is_over_other_units() -> None:
    windows = replace(TWO, words=np.array([2, 3]), text_bytes=np.array([12, 8]))
    reference = scores(("a", 6.0, 4), ("b", 4.0, 2))
    metrics = evaluation_metrics(
        reference=reference, comparison=compare(reference, reference, sections.bootstrap()), size_bytes=1,
        float_size_bytes=1, windows=windows,
    )  # fmt: skip
    assert metrics["word_perplexity"] == pytest.approx(math.exp(10 / 5))
    assert metrics["bits_per_byte"] == pytest.approx(10 / math.log(2) / 20)
    assert in_words(reference, windows) == scores(("a", 6.0, 2), ("b", 4.0, 3))
    with pytest.raises(UserError, match=r"set evaluate\.level=token"):
        in_words(reference, TWO)


def test_some_documents_are_whole_and_spread_over_the_text() -> None:
    many = cut_documents([(str(number), list(range(6))) for number in range(10)], protocol(), [])
    part, chosen = some_documents(many, 24)
    assert chosen.tolist() == [0, 3, 6, 9]
    assert part.document_ids == ("0", "3", "6", "9")
    assert part.input_ids.tolist() == 4 * [0, 1, 2, 3, 4, 5]
    assert part.document.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert part.offsets.tolist() == [0, 4, 6, 10, 12, 16, 18, 22, 24]
    whole, every = some_documents(many, 10**6)
    assert (whole.sha256, len(every)) == (many.sha256, 10)
    assert len(some_documents(many, 1)[1]) == 2


def test_document_scores_survive_the_file_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    reference = scores(("a\u2028b", 0.1 + 0.2, 3), ("ä", 1 / 3, 1))
    vllm = scores(("a\u2028b", 1e-9, 3), ("ä", 7.0, 1))
    write_documents(path, reference, vllm)
    assert read_documents(path) == (reference, vllm)
    first = path.read_bytes()
    write_documents(path, reference, vllm)
    assert path.read_bytes() == first
    write_documents(path, reference, None)
    assert read_documents(path) == (reference, None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["documents.jsonl"]
    path.write_text("{}\n")
    with pytest.raises(UserError, match="evaluate again"):
        read_documents(path)


def test_scores_are_read_from_the_reference_engines_file(tmp_path: Path) -> None:
    tensors = {"logprobs": np.zeros(3, np.float32), "top1": np.arange(3, dtype=np.int32)}
    write_safetensors(tmp_path / "scores.safetensors", tensors)
    found = load_scores(tmp_path / "scores.safetensors")
    logprobs, top1, kl = found["logprobs"], found["top1"], found.get("kl")
    assert (logprobs.dtype, top1.tolist(), kl) == (np.float32, [0, 1, 2], None)
    with pytest.raises(UserError, match="cannot be read"):
        load_scores(tmp_path / "absent.safetensors")


def test_the_size_is_that_of_all_weight_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no"):
        weight_bytes(tmp_path)
    for name, size in (("model-1.safetensors", 10), ("model-2.safetensors", 5), ("tokenizer.json", 100)):
        (tmp_path / name).write_bytes(bytes(size))
    assert weight_bytes(tmp_path) == 15
