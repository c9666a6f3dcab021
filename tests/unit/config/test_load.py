"""A good profile gives the values that it states; those that it does not state have their defaults."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from gdb_kprobe.config.load import find_profile, load_profile, profile_names
from gdb_kprobe.config.profile import (
    KernelConfig,
    KernelKind,
    PolicyConfig,
    Profile,
    RegionConfig,
    RegionSource,
    SharedMemory,
)
from gdb_kprobe.errors import KprobeError
from gdb_kprobe.model import Boost, Entry, PhysAddr, Rung, VirtAddr

CONFIGS = Path(__file__).parents[3] / "configs"

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "guest.yaml"
        path.write_text(text)
        return path

    return write


def test_the_least_profile_has_the_defaults(write: Write) -> None:
    path = write("gdbstub: localhost:1234\nregion:\n  source: ivshmem\n")
    assert load_profile(path) == Profile(
        name="guest",
        path=path,
        gdbstub="localhost:1234",
        region=RegionConfig(RegionSource.IVSHMEM, physical=None, virtual=None, size=16 << 20),
        kernel=KernelConfig(KernelKind.LINUX, symbols=None, vmlinux=None),
        policy=PolicyConfig((Rung.OPTIMIZED, Rung.BOOSTED, Rung.SINGLE_STEP)),
        shared_memory=SharedMemory.AUTO,
        qmp=None,
    )


def test_every_key_of_a_linux_profile(write: Write, tmp_path: Path) -> None:
    (tmp_path / "vmlinux").touch()
    path = write("""\
gdbstub: ./gdb
qmp: /run/guest/qmp
kernel: {kind: linux, vmlinux: vmlinux}
region:
  source: reserved
  physical: 0x10000000
  virtual: 0xffffffffc8000000
  size: 64 MiB
policy:
  rungs: [single-step]
shared_memory: off
""")
    assert load_profile(path) == Profile(
        name="guest",
        path=path,
        gdbstub=str(tmp_path / "gdb"),
        region=RegionConfig(
            RegionSource.RESERVED,
            physical=PhysAddr(0x1000_0000),
            virtual=VirtAddr(0xFFFF_FFFF_C800_0000),
            size=64 << 20,
        ),
        kernel=KernelConfig(KernelKind.LINUX, vmlinux=tmp_path / "vmlinux"),
        policy=PolicyConfig((Rung.SINGLE_STEP,)),
        shared_memory=SharedMemory.OFF,
        qmp=Path("/run/guest/qmp"),
    )


def test_a_bare_metal_profile(write: Write, tmp_path: Path) -> None:
    (tmp_path / "symbols.json").touch()
    profile = load_profile(
        write("""\
gdbstub: :1234
kernel: {kind: bare, symbols: symbols.json}
region: {source: premapped, virtual: 0x401000, size: 2M}
shared_memory: /dev/shm/ram
""")
    )
    assert profile.gdbstub == "localhost:1234"
    assert profile.kernel == KernelConfig(KernelKind.BARE, symbols=tmp_path / "symbols.json")
    assert profile.region == RegionConfig(RegionSource.PREMAPPED, virtual=VirtAddr(0x40_1000), size=2 << 20)
    assert profile.shared_memory == Path("/dev/shm/ram")


def test_rungs_are_best_first_however_they_are_written(write: Write) -> None:
    path = write("gdbstub: :1\nregion: {source: ivshmem}\npolicy: {rungs: [single-step, boosted]}\n")
    assert load_profile(path).policy.rungs == (Rung.BOOSTED, Rung.SINGLE_STEP)


@pytest.mark.parametrize("boost", Boost)
def test_what_is_boosted_may_be_said_without_rungs(write: Write, boost: Boost) -> None:
    path = write(f"gdbstub: :1\nregion: {{source: ivshmem}}\npolicy: {{boost: {boost}}}\n")
    assert load_profile(path).policy == PolicyConfig((Rung.OPTIMIZED, Rung.BOOSTED, Rung.SINGLE_STEP), boost)


@pytest.mark.parametrize("entry", list(Entry))
def test_where_probes_on_functions_go(write: Write, entry: Entry) -> None:
    path = write(f"gdbstub: :1\nregion: {{source: ivshmem}}\npolicy: {{entry: {entry}}}\n")
    assert load_profile(path).policy.entry is entry


def test_virtual_auto_is_no_placement(write: Write) -> None:
    assert load_profile(write("gdbstub: :1\nregion: {source: ivshmem, virtual: auto}\n")).region.virtual is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16M", 16 << 20),
        ("16 MiB", 16 << 20),
        ("16MiB", 16 << 20),
        ("8192K", 8 << 20),
        ("2048 KiB", 2 << 20),
        ("0x200000", 2 << 20),
        ("2097152", 2 << 20),
        ("'4M'", 4 << 20),
        ("1008M", 1008 << 20),
    ],
)
def test_sizes(write: Write, text: str, size: int) -> None:
    path = write(f"gdbstub: :1\nregion: {{source: ivshmem, size: {text}}}\n")
    assert load_profile(path).region.size == size


@pytest.mark.parametrize(
    ("first", "size"),
    [(0xFFFF_FFFF_C000_0000, "1008M"), (0xFFFF_FFFF_C000_0000, "2M"), (0xFFFF_FFFF_FEE0_0000, "2M")],
)
def test_both_ends_of_the_module_area_are_allowed(write: Write, first: int, size: str) -> None:
    path = write(f"gdbstub: :1\nregion: {{source: ivshmem, virtual: {first:#x}, size: {size}}}\n")
    assert load_profile(path).region.virtual == first


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("localhost:1234", "localhost:1234"),
        ("10.0.0.1:01234", "10.0.0.1:1234"),
        ("'[::1]:1234'", "[::1]:1234"),
        ("/run/guest/gdb", "/run/guest/gdb"),
    ],
)
def test_gdbstub_addresses(write: Write, text: str, address: str) -> None:
    assert load_profile(write(f"gdbstub: {text}\nregion: {{source: ivshmem}}\n")).gdbstub == address


def test_variables_come_from_the_environment_or_their_default(write: Write) -> None:
    path = write("gdbstub: ${DIR}/${NAME:-gdb}\nqmp: ${DIR}/${QMP:-qmp}\nregion: {source: ivshmem}\n")
    profile = load_profile(path, {"DIR": "/run/guest", "QMP": "monitor"})
    assert profile.gdbstub == "/run/guest/gdb"
    assert profile.qmp == Path("/run/guest/monitor")


def test_the_process_environment_is_the_default(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUEST_DIRECTORY", "/run/guest")
    assert (
        load_profile(write("gdbstub: ${GUEST_DIRECTORY}/gdb\nregion: {source: ivshmem}\n")).gdbstub == "/run/guest/gdb"
    )


def test_home_directory(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load_profile(write("gdbstub: ~/gdb\nregion: {source: ivshmem}\n")).gdbstub == "/home/somebody/gdb"


# -- configs/ ----------------------------------------------------------------------------------------------------------


def test_there_are_profiles_for_each_source() -> None:
    assert {"bare", "debian", "ivshmem", "plain"} <= set(profile_names([CONFIGS]))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_profile_of_the_project_loads(path: Path, tmp_path: Path) -> None:
    (tmp_path / "symbols.json").write_text("{}")
    stub = str(tmp_path / "gdb")
    environment = {"KPROBE_GUEST": str(tmp_path), "KPROBE_SYMBOLS": str(tmp_path / "symbols.json"), "KPROBE_STUB": stub}
    profile = load_profile(path, environment)
    assert profile.gdbstub == stub
    assert profile.qmp in (tmp_path / "qmp", None)


def test_the_profile_for_a_plain_qemu_is_for_its_usual_port() -> None:
    profile = load_profile(CONFIGS / "plain.yaml", {})
    assert (profile.gdbstub, profile.region.source) == ("localhost:1234", RegionSource.BORROWED)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_profile_of_the_project_says_what_it_is_for(path: Path) -> None:
    comment = re.match(r"(#.*\n)+", path.read_text())
    assert comment is not None
    assert "qemu-system-x86_64" in comment[0]


def test_the_physical_address_is_the_one_that_the_comment_reserves() -> None:
    text = (CONFIGS / "debian.yaml").read_text()
    reserved = re.search(r"memmap=(\d+)M\$(0x[0-9a-f]+)", text)
    assert reserved is not None
    region = load_profile(CONFIGS / "debian.yaml", {"KPROBE_GUEST": "/run"}).region
    assert (region.size, region.physical) == (int(reserved[1]) << 20, int(reserved[2], 16))


# -- by name -----------------------------------------------------------------------------------------------------------


def test_a_profile_is_found_by_name_in_the_first_directory_that_has_it(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory, name in ((first, "a.yaml"), (second, "a.yaml"), (second, "b.yml")):
        directory.mkdir(exist_ok=True)
        (directory / name).touch()
    search = [tmp_path / "missing", first, second]
    assert find_profile("a", search) == first / "a.yaml"
    assert find_profile("b", search) == second / "b.yml"
    assert find_profile(str(second / "a.yaml"), search) == second / "a.yaml"
    assert profile_names(search) == ["a", "b"]


def test_an_unknown_name_lists_the_names_there_are(tmp_path: Path) -> None:
    for name in ("debian.yaml", "bare.yaml"):
        (tmp_path / name).touch()
    with pytest.raises(KprobeError) as caught:
        find_profile("debain", [tmp_path])
    assert caught.value.message == "there is no profile named 'debain'"
    assert caught.value.hint == "did you mean debian? profiles: bare, debian"


def test_an_unknown_path_is_told(tmp_path: Path) -> None:
    with pytest.raises(KprobeError) as caught:
        find_profile(str(tmp_path / "x.yaml"), [tmp_path])
    assert caught.value.message == f"there is no profile {tmp_path}/x.yaml"
    assert caught.value.hint == f"no profiles in {tmp_path}; give the path of one"
