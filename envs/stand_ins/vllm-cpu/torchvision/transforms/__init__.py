"""Changes of images: only the names of ways to interpolate, which processors take as defaults."""

import enum

from torchvision import absent


class InterpolationMode(enum.Enum):
    """Torchvision's names."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


from torchvision.transforms import functional, v2  # noqa: E402, F401 (they use what stands above)

# After the modules, for which it would answer too.
__getattr__ = absent
