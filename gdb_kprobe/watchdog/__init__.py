"""A process beside gdb that outlives it, and has the guest run on when gdb was killed.

QEMU keeps the breakpoints of a client that has gone: a guest with a probe that needs gdb would stop at its next hit,
and nobody would come. So each attachment starts a process of its own (:mod:`~gdb_kprobe.watchdog.process`), that hears
from gdb by a pipe (:mod:`~gdb_kprobe.watchdog.handle`) and does nothing as long as that is open.
"""
