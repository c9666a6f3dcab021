"""``./install.sh reference``, once that has set everything up."""

from __future__ import annotations

import sys

from tests.reference import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND.main())
