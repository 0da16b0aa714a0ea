"""What a user may have meant by a name that is not known: the words of the field's libraries, and near spellings."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

# Words of other tools for options of this one, by the last part of the option's name. A name with a dot is whole.
_OPTIONS = {
    "damp_percent": ("damp", "percdamp", "dampening_frac", "dampening"),
    "desc_act": ("act_order", "actorder", "activation_order"),
    "group_size": ("group", "groupsize", "q_group_size", "block_size", "blocksize"),
    "bits": ("w_bit", "wbits", "wbit", "bit", "nbits", "num_bits", "weight_bits"),
    "sym": ("symmetric", "is_sym"),
    "zero_point": ("zeropoint", "zp", "asym", "asymmetric"),
    "n_samples": ("nsamples", "num_samples", "num_calibration_samples", "max_calib_samples"),
    "calibration.seq_len": ("seqlen", "seq_length", "max_seq_length", "max_seq_len", "max_calib_seq_len"),
    "max_model_len": ("max_len", "max_length", "context_length", "ctx_size", "n_ctx", "ctx"),
    "trust_remote_code": ("trust_remote", "remote_code"),
    "tensor_parallel_size": ("tp", "tensor_parallel"),
    "quant_type": ("bnb_4bit_quant_type",),
    "double_quant": ("bnb_4bit_use_double_quant", "use_double_quant"),
    "num_fewshot": ("n_shot", "fewshot", "num_few_shot"),
    "iters": ("steps", "n_iters"),
    "lm_head": ("quant_lm_head", "lmhead"),
    "model.path": ("model_path", "pretrained", "model_name_or_path"),
    "model.repo": ("model_id", "repo_id"),
    "model.revision": ("commit", "branch"),
    "method": ("quant_method", "algorithm", "algo", "scheme"),
    "calibration": ("dataset", "calib", "calib_data"),
    "evaluate": ("eval",),
}
_CHOICES = {
    "bnb": ("bitsandbytes", "nf4", "fp4", "llm_int8"),
    "rtn": ("round_to_nearest", "naive"),
    "autoround": ("auto_round",),
    "float": ("fp16", "bf16", "none", "baseline"),
    "jsonl": ("json", "file", "own", "custom"),
    "pileval": ("pile", "pile_val"),
    "perplexity": ("ppl",),
    "none": ("off", "false", "null"),
}


def option_meant(key: str, names: Sequence[str]) -> str:
    """A suggestion such as ` (did you mean method.damp_percent?)` for an option that is not known, or an empty string.

    names: of all options and groups, with dots.
    """
    section, _, word = key.lower().replace("-", "_").rpartition(".")
    known = _known(word, _OPTIONS)
    last = {name: name.rpartition(".")[2] for name in names}
    for found in (
        [name for name in names if known and known in (name, last[name])],
        [name for name in names if last[name] == word],
        [name for name in names if len(word) > 2 and last[name].startswith(word)],
    ):
        inside = [name for name in found if section and name.startswith(f"{section}.")]
        if inside or found:
            return _shown(sorted(inside or found, key=lambda name: (name != known, name.count("."), name)))
    inside = [name for name in names if section and name.startswith(f"{section}.")]
    close = difflib.get_close_matches(key, inside, n=1, cutoff=0.75) or difflib.get_close_matches(key, names, n=1)
    return _shown(close)


def choice_meant(word: str, choices: Sequence[str]) -> str:
    """The same for the choice of a group, `method=bitsandbytes`."""
    plain = word.lower().replace("-", "_")
    known = _known(plain, _CHOICES)
    return _shown([known] if known in choices else difflib.get_close_matches(plain, choices, n=1))


def _known(word: str, table: dict[str, tuple[str, ...]]) -> str:
    return next((ours for ours, theirs in table.items() if word in theirs), "")


def _shown(found: Sequence[str]) -> str:
    return f" (did you mean {found[0]}?)" if found else ""
