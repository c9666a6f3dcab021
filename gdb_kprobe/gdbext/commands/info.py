"""``kprobe info``."""

from __future__ import annotations

from gdb_kprobe.gdbext import api
from gdb_kprobe.gdbext.commands import complete
from gdb_kprobe.gdbext.commands.base import Command, write
from gdb_kprobe.render.plan import handler, plan_body
from gdb_kprobe.render.probes import probe_info
from gdb_kprobe.render.region import region_use


class Info(Command):
    """Show everything about probes; without a name, about the attachment.

    kprobe info [NAME ... | all]

    Example:
      kprobe info open"""

    def run(self, argument: str) -> None:
        if not argument:
            self._attachment()
            return
        for probe in api.named(argument, "kprobe info"):
            write(probe_info(api.info(probe)))
            plan, inside = api.planned(probe), api.handler(probe)
            if plan is not None:
                write(plan_body(plan))
                if inside is not None:
                    write(handler(inside))
            if probe.last_error:
                write(f"last error of its handler:\n{probe.last_error}")

    def _attachment(self) -> None:
        attachment, guest, region, sites = api.attachment(), api.guest(), api.region(), api.sites()
        write(f"guest:      {guest.description}")
        if attachment.types:
            write(f"types:      {attachment.types}")
        write(f"connection: {attachment.connection}, {guest.vcpus} vCPU(s)")
        write(f"profile:    {attachment.profile}")
        how = "dispatched inside the guest" if attachment.in_guest else "dispatched by the stub's breakpoint there"
        write(f"#BP entry:  {api.place(guest.bp_entry)}, {how}")
        write(f"region:     {region.range.size >> 20} MiB at {region.range.start:#x} (physical {region.phys:#x})")
        write(f"counters:   {attachment.counters}")
        write(f"filled by:  {region_use(region.objects, region.free)}")
        write(f"slots:      {region.slots_used} bytes in use, {region.quarantined} quarantined")
        armed = sum(site.is_armed for site in sites)
        write(f"probes:     {len(api.probes())}, {armed} site(s) armed, {attachment.stops} stop(s) for a hit")

    def candidates(self, text: str) -> list[str]:
        return complete.probes(text)


def register() -> None:
    Info("info")
