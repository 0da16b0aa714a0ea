"""Which files make a model: weights by their index, and what a tokenizer or processor needs; the one place that knows.

Weights are `model.safetensors`, or `model.safetensors.index.json` and the files that it names, whatever these are called.
They may lie in folders below the index, where transformers finds them; what is written here has them beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quantline.core.errors import CheckpointError, QuantlineError
from quantline.core.files import read_json

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".gguf")
PICKLED_NAME = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle")
ADAPTER = "adapter_config.json"

# The model card, which is written where a model leaves the project; convert may carry over that of a foreign source.
CARD = "README.md"

# Any one of these can be a tokenizer, see `tokenizer_fault`.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")
# What tokenizers and processors read besides, files below these folders included.
FOLDERS = ("additional_chat_templates",)
TOKENIZER = (
    *VOCABULARIES, "tokenizer*", "*.model", "tekken.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template*", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    *(f"{folder}/*" for folder in FOLDERS),
)  # fmt: skip
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
# Kept whatever the layout of the weights; config.json is written anew.
COMPANIONS = (*TOKENIZER, "generation_config.json", *LICENCES)
CODE = ("*.py",)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file's path below the model's folder matches one of the patterns; * stops at a folder."""
    return any(
        fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns
    )  # fmt: skip


def files_of(folder: Path) -> list[str]:
    """The paths of the files that may belong to a model, in order: those in its folder and below `FOLDERS`."""
    inner = [path for name in FOLDERS if (folder / name).is_dir() for path in (folder / name).iterdir()]
    return sorted(path.relative_to(folder).as_posix() for path in (*folder.iterdir(), *inner) if path.is_file())


def matching(folder: Path, patterns: Sequence[str]) -> list[str]:
    """The paths of the files of a model that match one of the patterns, in order."""
    return [name for name in files_of(folder) if matches(name, patterns)]


def weights_of(names: Collection[str], read: Callable[[str], Path], *, pickled: bool = False) -> list[str]:
    """The files of a model's weights: its index and what that names, or the single file; empty if there is neither.

    Args:
        names: the files of the model's folder or repository.
        read: gives one of them as a local file.
        pickled: look for pickles instead of safetensors.

    Raises:
        CheckpointError: the index is damaged or names files outside its folder.
    """
    single, index = (PICKLED_NAME, PICKLED_INDEX) if pickled else (WEIGHTS_NAME, INDEX_NAME)
    found = [single] if single in names else []
    if index in names:
        found += [index, *sorted(set(weight_map(read(index)).values()))]
    return found


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, of an index.

    Raises:
        CheckpointError: it has none, or it names a file outside its folder.
    """
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensor to file names: fetch or write it again")
    for shard in sorted(set(shards.values())):
        # An index must not reach files outside its own folder, by a linked folder either.
        plain = not any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in shard.split("/"))
        if not plain or not (index.parent / shard).parent.resolve().is_relative_to(index.parent.resolve()):
            raise CheckpointError(f"{index}: {shard!r} is no file inside its folder: do not use this checkpoint")
    return shards


def beside(index: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """How the files of an index are called when all lie beside it: vLLM does not look into folders.

    Returns:
        File -> its usual name, and the index with these names; both are empty if no file is in a folder.

    Raises:
        CheckpointError: as `weight_map`.
    """
    tensors = weight_map(index)
    shards = sorted(set(tensors.values()))
    if not any("/" in shard for shard in shards):
        return {}, {}
    stem, _, suffix = index.name.removesuffix(".index.json").rpartition(".")
    names = {shard: f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}" for number, shard in enumerate(shards, 1)}
    return names, {**read_json(index), "weight_map": {name: names[shard] for name, shard in tensors.items()}}


_SAVE = "save it as safetensors"


def no_weights(
    label: str,
    names: Collection[str],
    *,
    read: Callable[[str], Path] | None = None,
    pickles: str = _SAVE,
) -> str:
    """Why a folder or repository with these files is no model that can be opened, and what to do.

    Args:
        label: of the folder or repository.
        names: its files.
        read: gives one of them as a local file, to say what kind of adapter it is.
        pickles: what to do about pickles of the usual names, `PICKLED_NAME` or `PICKLED_INDEX`.
    """
    if ADAPTER in names or any(name.startswith("adapter_model.") for name in names):
        return _adapter(label, _kind_of_adapter(names, read))
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
    if pickled:
        usual = next((name for name in (PICKLED_NAME, PICKLED_INDEX) if name in names), None)
        remedy = pickles if usual else _SAVE
        return f"{label}: holds pickled weights only ({usual or pickled[0]}), which can run code: {remedy}"
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if others:
        return f"{label}: holds {others[0]}, but neither {WEIGHTS_NAME} nor {INDEX_NAME}: rename it, or fetch the index"
    return f"{label}: has neither {WEIGHTS_NAME} nor {INDEX_NAME}: give a complete model, as transformers saves it"


# The kinds of peft (0.21) that add virtual tokens or modules and leave the weights as they are.
_ADDED = ("ADAPTION_PROMPT", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "PROMPT_TUNING")


def _kind_of_adapter(names: Collection[str], read: Callable[[str], Path] | None) -> str | None:
    """The peft_type of an adapter; None if that is not known."""
    if read is None or ADAPTER not in names:
        return None
    try:
        kind = read_json(read(ADAPTER)).get("peft_type")
    except QuantlineError:
        return None
    return kind if isinstance(kind, str) and kind else None


def _adapter(label: str, kind: str | None) -> str:
    usual = {None: "an adapter", "LORA": "a LoRA adapter", "IA3": "an IA3 adapter"}
    is_one = f"{label}: is {usual.get(kind, f'an adapter ({kind})')}, not a model"
    if kind in _ADDED:
        return f"{is_one}, and cannot be merged into one, since it changes no weights: give its base model"
    return (
        f"{is_one}: merge it into its base model first, with peft installed: "
        'python -c "from peft import AutoPeftModelForCausalLM as M; '
        "M.from_pretrained('ADAPTER').merge_and_unload().save_pretrained('MERGED')\", and copy the tokenizer to it"
    )


# Makes tokenizer.json from any other vocabulary, as transformers understands it.
_MAKE = (
    "uv run --no-project --with transformers --with sentencepiece --with protobuf python -c "
    "\"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('{0}').save_pretrained('{0}')\""
)


def tokenizer_fault(model: Path, shown: str = "DIR") -> str | None:
    """Why the files of a folder are no tokenizer that every stage reads alike; None if they are. Nothing is loaded.

    SentencePiece's own file is none: transformers reads it by the rules of the model's family, and where the family has
    others than the file, it makes another tokenizer without a word (5.19, model_type qwen2). Most environments lack the
    library, too.

    shown: the folder, in the command that makes tokenizer.json.
    """
    found = matching(model, VOCABULARIES)
    if not found:
        return f"has no tokenizer; add one of {', '.join(VOCABULARIES)} to the model"
    if all(name.endswith(".model") for name in found):
        lacks = f"has only SentencePiece's {found[0]} for a tokenizer, and needs tokenizer.json"
    elif found == ["vocab.json"] and not (model / "merges.txt").is_file():
        lacks = "has vocab.json without merges.txt, and needs both, or tokenizer.json"
    else:
        return None
    return f"{lacks}; take a revision that has it, or make it in a copy of the model: {_MAKE.format(shown)}"


def has_chat_template(model: Path) -> bool:
    """Whether the checkpoint's tokenizer has a chat template; vLLM refuses chat requests without one."""
    if (model / "chat_template.jinja").is_file() or (model / "chat_template.json").is_file():
        return True
    settings = model / "tokenizer_config.json"
    return settings.is_file() and bool(read_json(settings).get("chat_template"))
