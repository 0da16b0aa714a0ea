"""Changes of images: not there."""

from torchvision import absent as __getattr__  # noqa: F401
from torchvision.transforms import InterpolationMode  # noqa: F401
