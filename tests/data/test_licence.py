"""The licence is what the base model's publisher says, or it is not known."""

from __future__ import annotations

import pytest
import sections
from hub_server import COMMIT, Hub, serving

from quantline.data.licence import Licence, licence_of

REPO = "owner/tiny"
APACHE = "\n                  Apache License\n            Version 2.0, January 2004\n"


@pytest.fixture
def served(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    with serving(Hub({("models", REPO): {"config.json": b"{}"}})) as state:
        monkeypatch.setenv("HF_ENDPOINT", state.address)
        yield state


def pinned():
    return sections.model(repo=REPO, revision=COMMIT)


def local(folder):
    return sections.model(path=str(folder))


def test_the_card_on_the_hub_says_it_and_a_link_in_it_leads_to_the_base_model(served):
    served.cards[REPO] = {"license": "Apache-2.0"}
    assert licence_of(pinned(), None) == Licence("apache-2.0", said_by=f"the card of {REPO}")
    served.cards[REPO] = {"license": "other", "license_name": "tiny-research", "license_link": "LICENSE"}
    link = f"{served.address}/{REPO}/blob/{COMMIT}/LICENSE"
    assert licence_of(pinned(), None) == Licence("other", "tiny-research", link, f"the card of {REPO}")
    served.cards[REPO] = {"license": "other", "license_link": "https://owner.example/terms"}
    assert licence_of(pinned(), None).link == "https://owner.example/terms"


@pytest.mark.parametrize("card", [{}, {"license": "unknown"}, {"license": None}, {"language": "en"}])
def test_without_a_word_in_the_card_the_licence_file_counts_and_without_that_it_is_unknown(served, tmp_path, card):
    served.cards[REPO] = card
    assert licence_of(pinned(), None) == licence_of(pinned(), tmp_path) == Licence("unknown")
    (tmp_path / "LICENSE.txt").write_text(APACHE)
    assert licence_of(pinned(), tmp_path) == Licence("apache-2.0", said_by="the base model's file LICENSE.txt")


def test_a_hub_that_does_not_answer_leaves_it_to_the_files(served, tmp_path):
    served.cards[REPO] = {"license": "mit"}
    served.status = 503
    assert licence_of(pinned(), tmp_path).name == "unknown"


@pytest.mark.parametrize(
    ("text", "name"),
    [(APACHE, "apache-2.0"), ("MIT License\n\nCopyright", "mit"), ("Our licence.\nNot the Apache License 2.0.", "other")],
)  # fmt: skip
def test_a_file_is_named_only_by_how_it_begins(tmp_path, text, name):
    (tmp_path / "LICENCE").write_text(text)
    found = licence_of(local(tmp_path / "elsewhere"), tmp_path)
    assert (found.name, found.link) == (name, "LICENCE" if name == "other" else None)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_the_readme_of_a_folder_says_it(tmp_path, ends):
    (tmp_path / "README.md").write_bytes(ends.join(["---", "license: cc-by-4.0", "---", "# Tiny"]).encode())
    assert licence_of(local(tmp_path), tmp_path) == Licence("cc-by-4.0", said_by="the base model's README.md")


@pytest.mark.parametrize("text", [b"# no header", b"---\nlicense: [\n---\n", b"---\n- a list\n---\n", b"\xff\xfe"])
def test_a_readme_that_says_nothing_readable_says_nothing(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text)
    assert licence_of(local(tmp_path), None) == Licence()
