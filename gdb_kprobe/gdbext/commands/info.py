"""``kprobe info``."""

from __future__ import annotations

from gdb_kprobe.gdbext import api, plugin
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.base import Command, write
from gdb_kprobe.gdbext.views import handler_view, plan_view, probe_view
from gdb_kprobe.render.plan import handler, plan_body
from gdb_kprobe.render.probes import probe_info


class Info(Command):
    """Show everything about probes; without a name, about the attachment.

    kprobe info [NAME ... | all]

    Example:
      kprobe info open"""

    def run(self, argument: str) -> None:
        if not argument:
            self._attachment()
            return
        link = plugin.the_plugin().link
        for probe in api.named(argument, "kprobe info"):
            write(probe_info(probe_view(probe)))
            site = link.session.sites.of(probe) if link is not None else None
            if site is not None and probe.place is not None:
                write(plan_body(plan_view(probe, probe.place, site.plan)))
                inside = handler_view(probe, site)
                if inside is not None:
                    write(handler(inside))
            if probe.last_error:
                write(f"last error of its handler:\n{probe.last_error}")

    def _attachment(self) -> None:
        link = plugin.the_plugin().need_link()
        session = link.session
        header, slots = session.region.header, session.region.slots
        write(f"guest:      {session.guest.description}")
        if link.attached is not None and link.attached.types:
            write(f"types:      {link.attached.types}")
        write(f"connection: {link.address}, {len(session.machine.cpus())} vCPU(s)")
        write(f"profile:    {link.profile.path}")
        entry = session.guest.place_of(session.guest.bp_entry)
        how = (
            "dispatched inside the guest"
            if session.dispatches_in_guest
            else "dispatched by the stub's breakpoint there"
        )
        write(f"#BP entry:  {entry}, {how}")
        write(f"region:     {header.size >> 20} MiB at {header.virt:#x} (physical {header.phys:#x})")
        write(f"counters:   {link.data_plane()}")
        write(f"slots:      {slots.used} of {slots.area.size} bytes in use, {len(slots.quarantined)} quarantined")
        write(f"probes:     {len(session.probes)}, {len(session.sites.armed())} site(s) armed")

    def candidates(self, text: str) -> list[str]:
        return complete.probes(text)


def register() -> None:
    Info("info")
