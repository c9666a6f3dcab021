"""The owner outside: gdb after gdb with the plugin, and what its probes must have counted."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from gdb_kprobe.testing import GdbCommandError, GdbMi, GdbTimeoutError
from kprobe_guest import GuestVm
from tests.support.guests import environment, profile
from tests.torture.owners.guest_side import GuestSide
from tests.torture.owners.steps import Step

_TIMEOUT = 120
_SAVED = "has saved our jump"
_TRIES = 4
_CONDITIONS = {"true": " if ip != 12345", "false": " if ip == 12345"}
_NEEDS_GDB = "single-step"


class WrongError(Exception):
    """Something is not as it should be; the message says what."""


@dataclass
class _Probe:
    """A probe of ours, and what it must have counted: nothing is known of *hits* while it is ``None``."""

    addr: int
    is_enabled: bool
    never: bool
    rung: str = ""
    size: int = 1
    """Bytes that are patched."""
    is_saved: bool = False
    """A kprobe of the guest's own has saved its jump, which stays until that is gone, whatever becomes of the probe."""
    hits: int | None = 0

    def is_as(self, found: dict[str, str]) -> None:
        """Take over what ``-kprobe-list`` says of how it is armed."""
        self.rung, self.size, self.is_saved = found["rung"], int(found["bytes"]), found["saved"] == "1"


class OurSide:
    """What is attached to one guest, over several sequences and several gdbs."""

    def __init__(self, guest: GuestVm, inside: GuestSide) -> None:
        self._guest = guest
        self._inside = inside
        self._gdb: GdbMi | None = None
        self._is_attached = False
        self._runs = True
        self._probes: dict[str, _Probe] = {}
        self._is_killed = False
        self._staying: list[_Probe] = []
        """Probes that are gone, but for their jumps."""
        self._is_waited_for = False
        """The user was told that a jump stays until the guest has removed its kprobe there."""
        self.lost_interrupts = 0
        self.refusals: list[str] = []
        """What was refused, and why."""
        self.reasons: list[str] = []
        """Why a probe has not counted what it should have."""

    @property
    def transcript(self) -> list[str]:
        """What was last said with gdb."""
        return [] if self._gdb is None else self._gdb.transcript[-60:]

    def close(self) -> None:
        if self._gdb is not None:
            self._gdb.close()
            self._gdb = None

    def hides(self, addr: int) -> bool:
        """Whether the guest must refuse a kprobe of its own at *addr*.

        It is that of an int3 of ours, or within the instructions that a jump of ours displaces. Which a probe
        has may have changed when the guest was resumed, so that is asked again.
        """
        if self._is_attached:
            for name, found in self._listed().items():
                self._probes[name].is_as(found)
        return any(
            probe.addr < addr < probe.addr + probe.size or (addr == probe.addr and probe.rung != "optimized")
            for probe in (*self._probes.values(), *self._staying)
        )

    def give_way(self) -> None:
        """Have a look at the guest, now that its own owners are gone: what had to wait for that is done."""
        self._staying.clear()
        if self._is_attached:
            self._stop()
            self._look()
            self.let_run()
        elif self._is_waited_for:
            self._need_attached()
            self._command("kprobe detach")
            self._is_attached, self._runs, self._is_waited_for = False, True, False

    def let_run(self) -> None:
        """Have the guest run."""
        if not self._runs:
            assert self._gdb is not None
            self._gdb.cont()
            self._runs = True

    def take(self, step: Step, addr: int | None, others: bool) -> None:
        """Take a step; *addr* is its place, and *others* whether the guest has owners of its own there.

        :raises WrongError: it is refused without a reason.
        """
        name = step.words[0] if step.words else ""
        match step.verb:
            case "our.add":
                assert addr is not None
                self._add(step, addr, others)
            case "our.enable" | "our.disable":
                self._switch(name, step.verb == "our.enable", live="live" in step.words, others=others)
            case "our.delete":
                if name == "all" or name in self._probes:
                    self._delete(name)
            case "our.stop":
                if self._is_attached:
                    self._stop()
                    self._look()
            case "our.detach":
                if self._is_attached:
                    self._stop()
                    self._look()
                    said = self._command("kprobe detach")
                    self._is_waited_for = _SAVED in said
                    self._is_attached, self._runs = False, True
                    self._forget(*self._probes)
            case "our.attach":
                if self._is_killed:
                    self._forget_killed()
                self._need_attached()
            case "our.kill":
                self._kill(step.words[0])
            case "our.adopt":
                self._adopt(others)
            case "our.restore":
                self._restore()
            case other:
                raise AssertionError(f"not a step of ours: {other}")

    def count(self, calls: int) -> None:
        """The guest has made so many calls: what was it counted as?

        :raises WrongError: it was not counted, and nobody says why; or it was counted more than once.
        """
        for probe in self._probes.values():
            if self._is_killed and probe.rung == _NEEDS_GDB:
                probe.hits = None
            if probe.hits is not None and probe.is_enabled and not probe.never:
                probe.hits += calls
        if self._is_attached and self._probes and self._find_short(self._listed()):
            self._stop()
            self._look()
            self.let_run()

    # -- private ------------------------------------------------------------------------------------------------

    def _command(self, command: str) -> str:
        assert self._gdb is not None
        return self._gdb.console(command, timeout=_TIMEOUT)

    def _need_attached(self) -> None:
        if self._is_attached:
            return
        if self._gdb is None:
            self._gdb = GdbMi(environment(self._guest))
        self._command(f"kprobe attach {profile(self._guest)}")
        self._is_attached, self._runs, self._is_killed = True, False, False

    def _stop(self) -> None:
        assert self._gdb is not None
        if self._runs:
            for _ in range(_TRIES):
                try:
                    self._gdb.interrupt(_TIMEOUT / _TRIES)
                    break
                except GdbTimeoutError:
                    # A Ctrl-C at the very end of a command may be taken for one that is to end that.
                    self.lost_interrupts += 1
            else:
                raise WrongError("the guest does not stop")
            self._runs = False

    def _forget(self, *names: str) -> None:
        """They are gone, but for jumps that the guest has saved."""
        for name in names:
            probe = self._probes.pop(name)
            if probe.is_saved:
                self._staying.append(probe)

    def _forget_killed(self) -> None:
        """All are gone. What has been saved of the guest since gdb was killed is not known."""
        for probe in self._probes.values():
            probe.is_saved = probe.rung == "optimized"
        self._forget(*self._probes)

    def _listed(self) -> dict[str, dict[str, str]]:
        assert self._gdb is not None
        return {probe["name"]: probe for probe in self._gdb.command("-kprobe-list", timeout=_TIMEOUT)["probes"]}

    def _find_short(self, listed: dict[str, dict[str, str]]) -> dict[str, str]:
        """Which probes have not counted all that they should have, and what they say instead."""
        short = {}
        for name, probe in self._probes.items():
            if name not in listed:
                raise WrongError(f"{name} is not listed any more")
            found = listed[name]
            probe.is_as(found)
            counted = int(found["hits"])
            if probe.hits is None:
                probe.hits = counted
            if counted > probe.hits:
                raise WrongError(f"{name} has counted {counted}, not {probe.hits}: {found}")
            if counted < probe.hits or int(found["missed"]):
                short[name] = f"{name} has counted {counted}, not {probe.hits}: {found}"
        return short

    def _look(self) -> None:
        """At a stop: whoever has not counted all must say why.

        :raises WrongError: it does not.
        """
        listed = self._listed()
        for name, what in self._find_short(listed).items():
            found = listed[name]
            told = self._told(name)
            if found["state"] == "armed" and not found["error"] and not told:
                raise WrongError(what)
            self.reasons.append(f"{found['state']}: {found['error'] or told}")
            self._probes[name].hits = int(found["hits"])

    def _told(self, name: str) -> str:
        """What gdb has said of a probe that is not what it was."""
        assert self._gdb is not None
        for line in reversed(self._gdb.transcript[-200:]):
            if line.startswith("<- console") and f"{name}:" in line and " armed" not in line:
                return line
        return ""

    def _add(self, step: Step, addr: int, others: bool) -> None:
        name, _, strategy, *how = step.words
        if self._is_killed or name in self._probes:
            return
        self._need_attached()
        self._stop()
        self._look()
        assert self._gdb is not None
        self._command(f"set kprobe strategy {strategy}")
        condition = "".join(_CONDITIONS.get(word, "") for word in how)
        disabled = "--disabled " if "disabled" in how else ""
        try:
            self._command(f"kprobe add {disabled}p:{name} {addr:#x}{condition}")
        except GdbCommandError as error:
            is_shared = "is probed already" in str(error) and bool(self._probes)
            if not others and not is_shared and strategy != "optimized":
                raise WrongError(f"refused with nobody else there: {error}") from error
            self.refusals.append(str(error))
            return
        found = self._listed()[name]
        # It may be behind what stands at a function's entry.
        probe = _Probe(int(found["addr"], 16), is_enabled=not disabled, never="false" in how)
        probe.is_as(found)
        self._probes[name] = probe

    def _switch(self, name: str, enabled: bool, *, live: bool, others: bool) -> None:
        if not self._is_attached or name not in self._probes:
            return
        if not live:
            self._stop()
            self._look()
        try:
            self._command(f"kprobe {'enable' if enabled else 'disable'} {name}")
        except GdbCommandError as error:
            # What was never armed has no handler in the guest that could be switched while it runs.
            if not others and "no handler in the guest" not in str(error):
                raise WrongError(f"refused with nobody else there: {error}") from error
            self.refusals.append(str(error))
            return
        self._probes[name].is_enabled = enabled

    def _delete(self, name: str) -> None:
        if not self._is_attached:
            return
        self._stop()
        self._look()
        if name != "all":
            self._command(f"kprobe delete {name}")
            self._forget(name)
        elif self._probes:
            self._command("kprobe delete all")
            self._forget(*self._probes)

    def _kill(self, when: str) -> None:
        if self._gdb is None or not self._is_attached:
            return
        if when == "stopped":
            self._stop()
            self._look()
        else:
            self.let_run()
            # gdb says that the guest runs before it has told the stub.
            self._inside.answers()
        self._gdb.signal(signal.SIGKILL)
        self._gdb.wait_exit()
        self._gdb.close()
        self._gdb = None
        if when == "stopped":
            # Its text is its own as long as it was stopped: nothing is counted any more.
            for probe in self._probes.values():
                probe.hits = None
            self._guest.cont()
        self._is_attached, self._is_killed, self._runs = False, True, True

    def _adopt(self, others: bool) -> None:
        if not self._is_killed:
            return
        self._gdb = GdbMi(environment(self._guest))
        said = self._command(f"kprobe adopt {profile(self._guest)}")
        self._is_attached, self._runs, self._is_killed = True, False, False
        listed = self._listed()
        for name in [name for name in self._probes if name not in listed]:
            if not others:
                raise WrongError(f"{name} was not adopted: {said}")
            self.refusals.append(said)
            self._forget(name)
        self._look()

    def _restore(self) -> None:
        if not self._is_killed:
            return
        self._gdb = GdbMi(environment(self._guest))
        said = self._command(f"kprobe restore {profile(self._guest)}")
        if "Detached; the guest runs." not in said:
            raise WrongError(f"restore: {said}")
        self._is_waited_for = _SAVED in said
        self._forget_killed()
        self._is_killed = False
