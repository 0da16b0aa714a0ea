"""Operations on boxes: not there."""

from torchvision import absent as __getattr__  # noqa: F401
