"""``./install.sh matrix``, once that has set everything up."""

from __future__ import annotations

import sys

from tests.matrix import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND.main())
