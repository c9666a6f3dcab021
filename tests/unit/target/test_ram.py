"""RAM through its file, and the ivshmem device: what QEMU's monitor prints, understood."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from gdb_kprobe.errors import RegionError, TargetError
from gdb_kprobe.model import PhysAddr
from gdb_kprobe.target.ivshmem import find_bar
from gdb_kprobe.target.ram import RamBlock, RamView, SharedRam, ram_blocks

# QEMU 7.2, q35, 3 GiB: 2 GiB below the hole, 1 GiB above 4 GiB; shortened.
MTREE = """FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): mem
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000cafff (prio 0, rom): mem @00000000000c0000
  0000000000100000-000000007fffffff (prio 0, ram): mem @0000000000100000
  00000000b0000000-00000000bfffffff (prio 0, i/o): pcie-mmcfg-mmio
  00000000fe000000-00000000fe7fffff (prio 1, ram): vga.vram
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
  0000000100000000-000000013fffffff (prio 0, ram): mem @0000000080000000

FlatView #2
 AS "virtio-net-pci", root: bus master container
  0000000000000000-000000000009ffff (prio 0, ram): elsewhere
""".replace("\n", "\r\n")

PCI = """  Bus  0, device   0, function 0:
    Host bridge: PCI device 8086:29c0
      id ""
  Bus  0, device   1, function 0:
    Ethernet controller: PCI device 1af4:1041
      BAR4: 64 bit prefetchable memory at 0xfe000000 [0xfe003fff].
  Bus  0, device   4, function 0:
    RAM controller: PCI device 1af4:1110
      PCI subsystem 1af4:1100
      BAR0: 32 bit memory at 0xfea56000 [0xfea560ff].
      BAR2: 64 bit prefetchable memory at {} [{}].
      id ""
  Bus  0, device  31, function 0:
    ISA bridge: PCI device 8086:2918
""".replace("\n", "\r\n")


@pytest.fixture
def monitor(fake: Any) -> Any:
    fake.monitor_texts["info mtree -f"] = MTREE
    return fake


def block(start: int, end: int, name: str, offset: int) -> RamBlock:
    return RamBlock(PhysAddr(start), PhysAddr(end), name, offset)


def test_ram_is_found_on_both_sides_of_the_hole_below_4_gib(monitor: Any) -> None:
    assert ram_blocks(monitor) == (
        block(0, 0xA_0000, "mem", 0),
        block(0xC_0000, 0xC_B000, "mem", 0xC_0000),
        block(0x10_0000, 0x8000_0000, "mem", 0x10_0000),
        block(0xFE00_0000, 0xFE80_0000, "vga.vram", 0),
        block(0xFFFC_0000, 0x1_0000_0000, "pc.bios", 0),
        block(0x1_0000_0000, 0x1_4000_0000, "mem", 0x8000_0000),
    )


@pytest.mark.parametrize("text", ["", "unknown command: 'info mtree'\r\n"])
def test_a_monitor_that_tells_nothing_is_no_ram(monitor: Any, text: str) -> None:
    monitor.monitor_texts["info mtree -f"] = text
    assert ram_blocks(monitor) == ()
    assert SharedRam.discover(monitor) is None


@pytest.fixture
def shared(monitor: Any, tmp_path: Path) -> Any:
    """A file of 3 GiB (holes, mostly) behind the machine's RAM."""
    path = tmp_path / "ram"
    with path.open("wb") as file:
        file.truncate(3 << 30)
        for at, data in ((0x9FFFC, b"low."), (0x10_0000, b"text"), (0x8000_0000, b"high")):
            file.seek(at)
            file.write(data)
    monitor.monitor_texts |= {
        "qom-get /objects/mem share": "true\r\n",
        "qom-get /objects/mem mem-path": f'"{path}"\r\n',
    }
    return monitor


def test_shared_ram_is_read_at_the_right_place_of_its_file(shared: Any) -> None:
    ram = SharedRam.discover(shared)
    assert ram is not None
    assert ram.read_physical(PhysAddr(0x9FFFC), 4) == b"low."
    assert ram.read_physical(PhysAddr(0x10_0000), 4) == b"text"
    assert ram.read_physical(PhysAddr(0x1_0000_0000), 4) == b"high"
    ram.close()


@pytest.mark.parametrize(
    ("addr", "size"),
    [(0x9FFFE, 4), (0xB_0000, 1), (0x7FFF_FFFE, 4), (0x8000_0000, 1), (0xFE00_0000, 4), (0x1_4000_0000, 1)],
)
def test_what_is_not_wholly_in_the_file_is_not_covered(shared: Any, addr: int, size: int) -> None:
    ram = SharedRam.discover(shared)
    assert ram is not None
    assert not ram.covers(PhysAddr(addr), size)
    with pytest.raises(TargetError, match="not in the shared memory file"):
        ram.read_physical(PhysAddr(addr), size)
    ram.close()


@pytest.mark.parametrize(
    ("share", "path"),
    [("false\r\n", '"/dev/null"'), ("true\r\n", '"/nowhere/ram"'), ("true\r\n", "Error: no such property"), ("", "")],
)
def test_ram_that_cannot_be_shared_is_none(monitor: Any, share: str, path: str) -> None:
    monitor.monitor_texts |= {"qom-get /objects/mem share": share, "qom-get /objects/mem mem-path": path}
    assert SharedRam.discover(monitor) is None


class Ram:
    """What the stub would give, noted."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def read_physical(self, addr: PhysAddr, size: int) -> bytes:
        self.calls.append(("read", addr))
        return b"s" * size

    def write_physical(self, addr: PhysAddr, data: bytes) -> None:
        self.calls.append(("write", addr))

    def batch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def test_reads_take_the_file_where_it_is_and_writes_never_do(shared: Any) -> None:
    ram, stub = SharedRam.discover(shared), Ram()
    view = RamView(stub, ram)
    assert view.read_physical(PhysAddr(0x10_0000), 4) == b"text"
    assert view.read_physical(PhysAddr(0x9FFFE), 4) == b"ssss"
    view.write_physical(PhysAddr(0x10_0000), b"TEXT")
    assert stub.calls == [("read", 0x9FFFE), ("write", 0x10_0000)]
    assert view.read_physical(PhysAddr(0x10_0000), 4) == b"text", "the stub writes, and QEMU with it"


def test_without_a_file_everything_goes_through_the_stub() -> None:
    stub = Ram()
    assert RamView(stub, None).read_physical(PhysAddr(0), 2) == b"ss"


# -- ivshmem ------------------------------------------------------------------------------------------------------


def test_the_memory_of_an_ivshmem_device_is_its_bar_2(fake: Any) -> None:
    fake.monitor_texts["info pci"] = PCI.format("0x7000000000", "0x7000ffffff")
    assert find_bar(fake) == (0x70_0000_0000, 16 << 20)


def test_a_bar_without_an_address_means_that_the_firmware_has_not_run(fake: Any) -> None:
    fake.monitor_texts["info pci"] = PCI.format("0xffffffffffffffff", "0x00fffffe")
    with pytest.raises(RegionError, match=r"no address for its BAR 2\n.*let the guest's firmware run"):
        find_bar(fake)


def test_no_device_says_how_to_start_qemu_with_one(fake: Any) -> None:
    fake.monitor_texts["info pci"] = PCI.replace("1af4:1110", "1af4:1000").format("0xfe000000", "0xfeffffff")
    with pytest.raises(RegionError, match=r"no ivshmem device\n.*-device ivshmem-plain"):
        find_bar(fake)
