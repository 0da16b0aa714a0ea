"""Operations on boxes: not there."""

from torchvision import absent
from torchvision.ops import boxes  # noqa: F401

# After the modules, for which it would answer too.
__getattr__ = absent
