"""The part of the Python API that begins and ends a session."""

from __future__ import annotations

from gdb_kprobe.config.profile import Profile
from gdb_kprobe.gdbext.plugin import the_plugin
from gdb_kprobe.gdbext.profiles import chosen
from gdb_kprobe.model import Dispatch
from gdb_kprobe.session.inspect import AdoptResult, AttachResult
from gdb_kprobe.session.session import Detached


def attach(
    profile: Profile | str | None = None, dispatch: Dispatch = Dispatch.AUTO, *, arm_noted: bool = True
) -> AttachResult:
    """Attach to a guest, and arm the probes that were added before.

    gdb is connected to its gdbstub, if it is not connected already. The guest stays stopped. The text of probes that an
    earlier gdb left behind is restored; :func:`adopt` goes on with them.

    :param profile: that of the guest, or the name of one (:func:`profile`).
    :param dispatch: who handles int3s: the guest, the stub, or the guest if it can.
    :param arm_noted: ``False``: what was added before stays noted.
    :raises KprobeError: gdb is attached already, or is in non-stop mode; or there is no such profile.
    :raises GuestStateError: the guest's software is not up, or cannot dispatch as asked for.
    :raises RegionError: the region cannot be used as the profile describes it.
    """
    return the_plugin().attachments.attach(chosen(profile), dispatch, arm_noted=arm_noted)


def adopt() -> AdoptResult:
    """Add the probes that an earlier gdb left in the guest, as this gdb's :func:`attach` has found them.

    They keep their counts. Handlers in Python were in the other gdb: such a probe counts, and no more. A second call
    finds nothing to adopt.

    :raises NotAttachedError: gdb is attached to no guest.
    """
    return the_plugin().attachments.adopt()


def detach() -> Detached:
    """Undo everything in the guest. gdb stays connected, the guest stopped.

    :raises KprobeError: not attached; or a site cannot be restored: then gdb stays attached.
    """
    return the_plugin().attachments.detach()


def is_attached() -> bool:
    """Whether gdb is attached to a guest."""
    return the_plugin().attachments.link is not None


def need_attached() -> None:
    """Go on only if gdb is attached to a guest.

    :raises NotAttachedError: it is not.
    """
    the_plugin().attachments.need_link()
