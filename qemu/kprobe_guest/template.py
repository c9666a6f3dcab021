"""Guests without a boot: one is booted, stopped and saved, and each copy goes on from there in a fraction of the time.

The memory of the machine is a file, so that QEMU saves the devices alone (the capability ``x-ignore-shared``): some
300 KB. A copy has the same memory, kernel and symbols at the same addresses, the same random numbers to come, and the
same clock, which goes on from the moment of the saving.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from qemu.qmp import QMPError

from kprobe_guest.command_line import SavedMachine
from kprobe_guest.errors import GuestError
from kprobe_guest.spec import GuestSpec
from kprobe_guest.vm import GuestVm, copy_memory, memory_directory


class Template:
    """A saved machine; a context manager, which removes it. What was forked of it lives on.

    Use: ``with GuestVm(spec) as guest: template = Template(guest)``, then ``with template.fork() as guest:``.
    """

    def __init__(self, guest: GuestVm) -> None:
        """Save *guest*, which must run, be idle and have shared memory; it stays stopped, and is of no more use.

        :raises GuestError: QEMU cannot save it.
        """
        assert guest.ram_path is not None, "memory that is private cannot be kept as a file"
        self._spec = guest.spec
        self._directory = Path(tempfile.mkdtemp(prefix="gdb-kprobe-template-", dir="/tmp"))
        memory = memory_directory(guest.spec, self._directory)
        # Named as other memory of guests is: who finds it knows when its owner is gone.
        ram = memory / f"gdb-kprobe-{os.getpid()}-{self._directory.name}.ram"
        self._saved = SavedMachine(ram, self._directory / "devices")
        try:
            self._save(guest)
        except BaseException:
            self.close()
            raise

    def _save(self, guest: GuestVm) -> None:
        guest.stop()
        guest.share_memory()
        # The machine has stopped: QEMU has nothing to send twice, and no reason to limit how fast it writes.
        try:
            guest.qmp("migrate", uri=f"exec:cat > {shlex.quote(str(self._saved.devices))}")
        except QMPError as error:
            raise GuestError(f"QEMU cannot save the machine: {error}") from error
        guest.wait_migrated()
        assert guest.ram_path is not None
        copy_memory(guest.ram_path, self._saved.ram)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def saved(self) -> SavedMachine:
        """Its files."""
        return self._saved

    def fork(self, *, shared_ram: bool = True) -> GuestVm:
        """A copy of the machine, which is not started yet; its memory is a file of its own, or private to QEMU.

        Private memory is copied as it is written to; the files must stay until the copy has ended.
        """
        return GuestVm(replace(self._spec, shared_ram=shared_ram), saved=self._saved)

    def close(self) -> None:
        """Remove the files. May be called twice."""
        self._saved.ram.unlink(missing_ok=True)
        shutil.rmtree(self._directory, ignore_errors=True)


def template_of(spec: GuestSpec) -> Template:
    """Boot a guest and save it.

    :raises GuestError: it does not come up.
    """
    with GuestVm(spec) as guest:
        return Template(guest)
