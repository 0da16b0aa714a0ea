"""Reading of images: not there."""

import enum

from torchvision import absent as __getattr__  # noqa: F401


class ImageReadMode(enum.Enum):
    """Torchvision's names."""

    UNCHANGED = 0
    GRAY = 1
    GRAY_ALPHA = 2
    RGB = 3
    RGB_ALPHA = 4
