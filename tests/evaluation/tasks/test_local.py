from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import yaml

from quantline.config.tasks import LastWordConfig, LocalTasksConfig, MultipleChoiceConfig
from quantline.core.errors import UserError
from quantline.data.documents import read_documents
from quantline.evaluation.tasks.local import items_of, last_word_items, multiple_choice_items, write_tasks


@pytest.fixture(scope="module")
def texts(root):
    path = root / "assets" / "demo" / "evaluation.jsonl"
    return [document.text for document in read_documents(path, "jsonl", ("text",))]


LAST_WORD = LastWordConfig(context_words=48)
MULTIPLE_CHOICE = MultipleChoiceConfig(context_words=32, choices=4, continuation_words=12)
TASKS = (partial(last_word_items, LAST_WORD), partial(multiple_choice_items, MULTIPLE_CHOICE))


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_items_and_another_gives_others(texts, task):
    assert task(texts, 0, 50) == task(texts, 0, 50)
    assert task(texts, 0, 50) != task(texts, 1, 50)


@pytest.mark.parametrize("task", TASKS)
def test_fewer_items_are_the_first_of_more(texts, task):
    assert task(texts, 0, 20) == task(texts, 0, 200)[:20]
    assert len(task(texts, 0, 200)) == 200


def test_a_last_word_follows_its_context_in_the_text_after_one_blank(texts):
    for item in last_word_items(LAST_WORD, texts, 0, 200):
        assert any(item["context"] + item["target"] in text for text in texts)
        assert item["target"][0] == " "
        assert item["target"][1:].isalpha()
        assert len(item["context"].split()) == 48
        assert item["target"][1:] in item["context"]


def test_only_the_labelled_continuation_is_the_passages_own(texts):
    labels = []
    for item in multiple_choice_items(MULTIPLE_CHOICE, texts, 0, 200):
        own = [any(item["context"] + choice in text for text in texts) for choice in item["choices"]]
        assert own.index(True) == item["label"]
        assert own.count(True) == 1
        assert len(set(item["choices"])) == 4
        assert {len(choice.split()) for choice in item["choices"]} == {12}
        labels.append(item["label"])
    assert all(30 < labels.count(label) < 70 for label in range(4))


def test_every_document_gives_one_item_before_any_gives_a_second():
    texts = [" ".join([f"{name}word"] * 300) for name in ("red", "blue", "green")]
    first = [item["context"].split()[0][:3] for item in last_word_items(LastWordConfig(context_words=20), texts, 0, 6)]
    assert sorted(first[:3]) == sorted(first[3:]) == ["blu", "gre", "red"]


def test_a_text_that_is_too_short_is_refused_by_name():
    with pytest.raises(UserError, match=r"tasks\.local\.last_word: the text gives 0 items"):
        last_word_items(LAST_WORD, ["a few words"], 0, None)
    with pytest.raises(UserError, match=r"tasks\.local\.multiple_choice"):
        multiple_choice_items(MULTIPLE_CHOICE, ["a few words"], 0, None)


def test_a_definition_names_its_items_and_a_cache_of_its_own(tmp_path, texts):
    items = items_of(LocalTasksConfig(last_word=LAST_WORD, multiple_choice=MULTIPLE_CHOICE), texts, 0, 3)
    assert list(items) == ["last_word", "multiple_choice"]
    write_tasks(items, tmp_path)
    for name, rows in items.items():
        definition = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        assert definition["task"] == name
        path = definition["dataset_kwargs"]["data_files"]["test"]
        assert [json.loads(line) for line in Path(path).read_text().splitlines()] == rows
        assert definition["dataset_kwargs"]["cache_dir"].startswith(str(tmp_path))
