"""Headers of safetensors in the vocabulary of transformers 4, as `model_config` gives it a config.json in its own."""

from __future__ import annotations

from typing import Any


def said_to_be_torch(module: Any) -> list[tuple[Any, str, Any]]:
    """The replacement, as (owner, name, value), by which transformers 4 reads every file as one that torch wrote.

    4.52 raises where `__metadata__` has no `"format": "pt"`, as files of many tools do; 5 no longer looks at it. The files
    are not copied: a header cannot grow in place, and large models have many gigabytes.

    module: `transformers.modeling_utils`.
    """
    original = module.safe_open

    class Opened:
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            self._file = original(*arguments, **keywords)

        def __enter__(self) -> Any:
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> Any:
            return self._file.__exit__(*error)

        def metadata(self) -> dict[str, str]:
            return {**(self._file.metadata() or {}), "format": "pt"}

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    return [(module, "safe_open", Opened)]
