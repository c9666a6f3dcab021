"""A system call that nothing else in a test guest makes: as many hits as a test makes calls."""

from __future__ import annotations

from typing import Final

GETPRIORITY: Final = 140
"""Its number (arch/x86/entry/syscalls/syscall_64.tbl)."""
ENTRY: Final = "__x64_sys_getpriority"
"""Where the kernel enters it, and what that calls, or goes on in."""
BODY: Final = "__do_sys_getpriority"
