"""Options of the float model and of the calibration text."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantline.config.section import Section


class ModelConfig(Section):
    """Where the float model comes from: exactly one of `repo` and `path`.

    Attributes:
        name: what it is called; null takes the end of the repository's name or of the path.
        repo: `owner/name` on the hub.
        revision: its commit, 40 hex digits.
        path: a folder; a relative one starts at the working directory.
        allow_pickle: take pickled weights where there are no safetensors; loading them can run code.
        trust_remote_code: accept a model that brings its own Python code, and take that code along.
    """

    name: str | None
    repo: str | None
    revision: str | None
    path: str | None
    allow_pickle: bool
    trust_remote_code: bool


class SourceConfig(Section):
    """One source of calibration text: a local file, or a file of a hub's data set at a pinned commit.

    Attributes:
        weight: its share of the samples, relative to the other sources.
        path: a local file; a relative one starts at the working directory. Where it is set, repo, revision and file are
            not used.
        repo, revision, file: `owner/name` on the hub, its commit, and the path of the file in it.
        format: one of `data.documents.FORMATS`, needed where the file's name does not tell it.
        text_field: the field or column with the text, dots for nested ones. A local file that stands in for a hub's may
            also have `text`.
    """

    weight: float = Field(gt=0.0, allow_inf_nan=False)
    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    file: str | None = None
    format: str | None = None
    text_field: str = "text"


class CalibrationConfig(Section):
    """Which text the methods calibrate on, and how it becomes samples of equal length; see `data.sampling`.

    Attributes:
        name: of the group's file.
        path: a file of the user's, which a source reads.
        n_samples, seq_len: how many samples, and how many tokens in each.
        seed: of the choice of documents and their parts.
        chat_template: render texts and messages by the model's chat template.
        packing: "concat" joins documents and cuts them; "document" takes a part of each document that is long enough.
        skip_empty: leave out empty rows instead of refusing them.
        sources: by name.
    """

    name: str
    path: str | None
    n_samples: int = Field(ge=1)
    seq_len: int = Field(ge=8)
    seed: int = Field(ge=0)
    chat_template: bool
    packing: Literal["concat", "document"]
    skip_empty: bool
    sources: dict[str, SourceConfig] = Field(min_length=1)


EMBEDDED_MODEL = "assets/demo/model"
