"""The names of torchvision that transformers and vLLM import for models that also take images. Using one is an error.

The CPU environment leaves torchvision out: the package index has it for CUDA alone. Yet the classes of Qwen3.5, Gemma 3 and
other families import it, also where they only read text.
"""

from typing import Any

# transformers compares it with the versions that it wants.
__version__ = "0.28.0"


class Absent:
    """Stands for a class or function; using it says what is missing."""

    def __init__(self, *_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("torchvision is only stood in for in this environment: it takes no images; give text alone")

    def __class_getitem__(cls, _item: Any) -> type:
        return cls


def absent(name: str) -> type[Absent]:
    """What a module of this stand-in gives for a name that it does not have."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (Absent,), {})


from torchvision import io, ops, transforms  # noqa: E402, F401 (they use what stands above)
