"""Let DVC take reflinks in a checkout whose file system has them; see `quantline.lifecycle.storage.linked`.

Usage: PYTHONPATH=src python tools/prefer_reflinks.py CHECKOUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from quantline.lifecycle.storage.linked import prefer_reflinks

if prefer_reflinks(Path(sys.argv[1])):
    print("this file system has reflinks: DVC takes them (.dvc/config.local)")
