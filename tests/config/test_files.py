from __future__ import annotations

import pytest

from quantline.config import files


@pytest.fixture
def conf(tmp_path):
    """A folder of configurations with one group, one of whose choices writes to another section."""
    (tmp_path / "size").mkdir()
    (tmp_path / "config.yaml").write_text(
        "defaults:\n  - size: small\n  - _self_\n  - override hydra/help: x\nbits: 4  # width\n"
    )
    (tmp_path / "size" / "small.yaml").write_text("# Small things.\nmany: 1   # how many\ndeep: {a: 1, b: 2}\n")
    (tmp_path / "size" / "large.yaml").write_text("defaults: [small, _self_]\ndeep: {b: 3}\n")
    return tmp_path


def test_groups_have_their_default_choice(conf):
    assert files.groups(conf) == {"size": "small"}


def test_a_choice_lies_on_top_of_those_that_it_names(conf):
    assert files.chosen(conf, "size", "large") == {"many": 1, "deep": {"a": 1, "b": 3}}


def test_the_choices_of_a_command_line_are_those_that_exist(conf):
    assert files.choices_of(conf, ["size=large", "bits=8"]) == {"size": "large"}
    assert files.choices_of(conf, ["size=huge", "--help"]) == {"size": "small"}


def test_comments_belong_to_their_file_and_key(conf):
    assert files.comments(conf / "size" / "small.yaml") == (("Small things.",), {"many": ("how many",)})
    assert files.texts(conf, "size", "small") == {"size.many": ("how many",)}


def test_values_are_shown_as_they_are_written():
    assert [files.shown(value) for value in (None, True, 4, [1, "a"], "\n\n", "word")] == [
        "null", "true", "4", "[1, a]", '"\\n\\n"', "word",
    ]  # fmt: skip
    assert dict(files.flat({"a": {"b": 1}, "c": {}})) == {"a.b": 1, "c": {}}
