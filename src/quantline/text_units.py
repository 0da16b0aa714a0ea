"""Words and bytes of the text that was scored: perplexity per token means nothing between models of different tokenizers,
per word and per byte it does.

A word is what white space parts, and belongs to where it begins; bytes are UTF-8. Both are counted as what a window's text
has beyond its context's, so that a space which a tokenizer drops at the beginning of a text is not lost. A character cut
in two by a window's border counts as what the tokenizer shows in its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from quantline.windows import Windows


def count_units(tokenizer: Any, windows: Windows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Words and bytes of each document's scored text, int64 (documents,) each.

    tokenizer: of the transformers library, the one that made the windows.
    """
    words = np.zeros(len(windows.document_ids), dtype=np.int64)
    size = np.zeros_like(words)
    bounds = zip(windows.offsets[:-1], windows.offsets[1:], windows.context, windows.document, strict=True)
    for begin, end, context, document in bounds:
        whole, before = (_text(tokenizer, windows.input_ids[begin:stop]) for stop in (end, begin + context))
        words[document] += len(whole.split()) - len(before.split())
        size[document] += len(whole.encode()) - len(before.encode())
    return words, size


def _text(tokenizer: Any, ids: NDArray[np.int32]) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))
