"""Snapshots of a running guest: its memory and devices, as QEMU's ``savevm`` and ``loadvm`` keep them.

QEMU wants an image to put them into that takes snapshots. The guest is not started with one: an empty qcow2 file is
made and added while it runs, with no device, so that the guest does not see it.
"""

from __future__ import annotations

import time

from kprobe_guest.errors import GuestError
from kprobe_guest.private import private_file
from kprobe_guest.vm import GuestVm

_NODE = "snapshots"
_IMAGE_SIZE = 1 << 20
_TIMEOUT = 60


class Snapshots:
    """The snapshots of *guest*, for all that ask for the same ones. They are gone with it."""

    def __init__(self, guest: GuestVm) -> None:
        """:raises GuestError: QEMU cannot make the image."""
        self._guest = guest
        nodes = guest.qmp("query-named-block-nodes", flat=True)
        assert isinstance(nodes, list)
        if any(node["node-name"] == _NODE for node in nodes):
            return
        path = private_file(guest.directory / "snapshots.qcow2")
        file = f"{_NODE}-file"
        guest.qmp("blockdev-add", **{"driver": "file", "filename": str(path), "node-name": file})
        options = {"driver": "qcow2", "file": file, "size": _IMAGE_SIZE}
        guest.qmp("blockdev-create", **{"job-id": _NODE, "options": options})
        self._finish_job()
        guest.qmp("blockdev-add", **{"driver": "qcow2", "file": file, "node-name": _NODE})

    def save(self, name: str) -> None:
        """Save the machine as *name*; it goes on as before, running or stopped.

        :raises GuestError: QEMU cannot.
        """
        self._command(f"savevm {name}")

    def load(self, name: str) -> None:
        """Load *name*; the machine runs afterwards if it did before.

        :raises GuestError: QEMU cannot.
        """
        self._command(f"loadvm {name}")

    def delete(self, name: str) -> None:
        """Delete *name*.

        :raises GuestError: there is none.
        """
        self._command(f"delvm {name}")

    def _command(self, command: str) -> None:
        if said := self._guest.hmp(command).strip():
            raise GuestError(f"QEMU's monitor answers to '{command}': {said}")

    def _finish_job(self) -> None:
        deadline = time.monotonic() + _TIMEOUT
        while True:
            jobs = self._guest.qmp("query-jobs")
            assert isinstance(jobs, list)
            job = next(job for job in jobs if job["id"] == _NODE)
            if job["status"] == "concluded":
                break
            if time.monotonic() > deadline:
                raise GuestError("QEMU does not come to an end with the image for snapshots")
            time.sleep(0.02)
        self._guest.qmp("job-dismiss", id=_NODE)
        if "error" in job:
            raise GuestError(f"QEMU cannot make the image for snapshots: {job['error']}")
