"""``python -m sodfast``: the same as the command ``sodfast``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
