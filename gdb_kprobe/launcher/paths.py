"""Where things are in the checkout."""

from __future__ import annotations

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
CONFIGS = CHECKOUT / "configs"
LOADER = CHECKOUT / "gdb_kprobe" / "gdbext" / "load.py"
