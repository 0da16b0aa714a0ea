"""Changes of images: not there."""

from torchvision import absent
from torchvision.transforms import InterpolationMode  # noqa: F401
from torchvision.transforms.v2 import functional  # noqa: F401

# After the modules, for which it would answer too.
__getattr__ = absent
