"""Options of the float model and of the calibration text."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from quantline.config.section import Section


class ModelConfig(Section):
    """Where the float model comes from: exactly one of `repo` and `path`.

    Attributes:
        name: its name; null takes the end of the path or of the repository's name.
        repo: `owner/name` on the hub.
        revision: its commit, 40 hex digits.
        path: a local folder; relative to the working directory.
        allow_pickle: accept pickled weights where there are no safetensors; loading them can run code.
        trust_remote_code: accept a model that brings its own Python code, and keep that code with it.
    """

    name: str | None
    repo: str | None
    revision: str | None
    path: str | None
    allow_pickle: bool
    trust_remote_code: bool


class SourceConfig(Section):
    """One source of calibration text: a local file, or a file of a data set on the hub at a pinned commit."""

    weight: float = Field(
        gt=0.0, allow_inf_nan=False, description="share of the samples, relative to the other sources"
    )
    path: str | None = Field(
        default=None,
        description="local file; relative to the working directory. If set, repo, revision and file are unused",
    )
    repo: str | None = Field(default=None, description="owner/name of a data set on the hub")
    revision: str | None = Field(default=None, description="commit of repo, 40 hex digits")
    file: str | None = Field(default=None, description="path of the file in repo")
    # One of `data.documents.FORMATS`.
    format: str | None = Field(default=None, description="file format; null takes it from the file's name")
    text_field: str = Field(
        default="text",
        description="field or column with the text, with dots for nested ones; a local file that replaces one of the "
        "hub may also use `text`",
    )


class SelfTextConfig(Section):
    """How the float model writes calibration text; see `data.self_text`."""

    temperature: float = Field(gt=0.0, le=2.0, description="of the sampling; 1 is the model's own distribution")
    chat_share: float = Field(
        ge=0.0, le=1.0, description="share of texts that start as a chat, where the tokenizer has a chat template"
    )


class CalibrationConfig(Section):
    """The calibration text, and how it becomes samples of equal length; see `data.sampling`.

    Attributes:
        name: of the group's file.
        path: the user's own file, which a source reads.
        n_samples, seq_len: number of samples, and of tokens in each.
        held_back: further samples that no quantizer sees; fewer where the text does not give them.
        seed: of the choice of documents and their parts.
        chat_template: render texts and messages by the model's chat template.
        packing: "concat" joins documents and cuts them; "document" takes a part of each document that is long enough.
        skip_empty: skip empty rows instead of failing on them.
        sources: by name.
        self_text: how the float model writes text; null where it does not.
    """

    name: str
    path: str | None
    n_samples: int = Field(ge=1)
    seq_len: int = Field(ge=8)
    held_back: int = Field(default=0, ge=0)
    seed: int = Field(ge=0)
    chat_template: bool
    packing: Literal["concat", "document"]
    skip_empty: bool
    sources: dict[str, SourceConfig]
    self_text: SelfTextConfig | None = None

    @model_validator(mode="after")
    def _has_text(self) -> CalibrationConfig:
        if not self.sources and self.self_text is None:
            raise ValueError("sources is empty; give a source with a path, or calibration=self")
        return self


EMBEDDED_MODEL = "assets/demo/model"
DEMO_TEXT = "demo"  # the group of calibration/ that is the embedded model's text
