"""``set kprobe ...`` and ``show kprobe ...``: what is a setting rather than an act."""

from __future__ import annotations

from dataclasses import dataclass

import gdb

from gdb_kprobe.model import Rung
from gdb_kprobe.render.nearest import nearest

AUTO = "auto"


class _Switch(gdb.Parameter):
    def __init__(self, name: str, doc: str, default: bool) -> None:
        self.__doc__ = self.set_doc = self.show_doc = doc
        self.name = name
        super().__init__(f"kprobe {name}", gdb.COMMAND_BREAKPOINTS, gdb.PARAM_BOOLEAN)
        self.value = default

    def get_set_string(self) -> str:
        return ""

    def get_show_string(self, svalue: str) -> str:
        return f"kprobe {self.name} is {svalue}."


class _Choice(gdb.Parameter):
    def __init__(self, name: str, doc: str, choices: tuple[str, ...]) -> None:
        self.__doc__ = self.set_doc = self.show_doc = doc
        self.name = name
        super().__init__(f"kprobe {name}", gdb.COMMAND_BREAKPOINTS, gdb.PARAM_ENUM, choices)
        self.value = choices[0]

    def get_set_string(self) -> str:
        return ""

    def get_show_string(self, svalue: str) -> str:
        return f"kprobe {self.name} is {svalue}."


class _Text(gdb.Parameter):
    def __init__(self, name: str, doc: str) -> None:
        self.__doc__ = self.set_doc = self.show_doc = doc
        self.name = name
        super().__init__(f"kprobe {name}", gdb.COMMAND_BREAKPOINTS, gdb.PARAM_OPTIONAL_FILENAME)
        self.value = ""

    def get_set_string(self) -> str:
        return ""

    def get_show_string(self, svalue: str) -> str:
        return f'kprobe {self.name} is "{svalue}".'


class _SetPrefix(gdb.Command):
    """Change a setting of kprobe commands.

    'show kprobe' shows them all as they are now.

    Example:
      set kprobe strategy boosted"""

    def __init__(self) -> None:
        super().__init__("set kprobe", gdb.COMMAND_BREAKPOINTS, gdb.COMPLETE_NONE, prefix=True)

    def invoke(self, argument: str, from_tty: bool) -> None:
        raise gdb.GdbError(_no_setting("set", argument.strip()))


class _ShowPrefix(gdb.Command):
    """Show the settings of kprobe commands.

    Example:
      show kprobe"""

    def __init__(self) -> None:
        super().__init__("show kprobe", gdb.COMMAND_BREAKPOINTS, gdb.COMPLETE_NONE, prefix=True)

    def invoke(self, argument: str, from_tty: bool) -> None:
        if argument.strip():
            raise gdb.GdbError(_no_setting("show", argument.strip()))
        assert _registered is not None
        for parameter in _registered.all():
            gdb.execute(f"show kprobe {parameter.name}")


def _no_setting(verb: str, argument: str) -> str:
    assert _registered is not None
    names = [parameter.name for parameter in _registered.all()]
    if not argument:
        return f"which setting?\n  hint: {verb} kprobe {'|'.join(names)}; 'show kprobe' shows them"
    word = argument.split()[0]
    near = nearest(word, names)
    question = "" if near is None else f"did you mean '{near}'? "
    return f"kprobe has no setting {word!r}\n  hint: {question}There are {', '.join(names)}"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings as they are now."""

    verbose_errors: bool
    strategy: Rung | None
    profile: str
    watchdog: bool


class _Registered:
    def __init__(self) -> None:
        _SetPrefix()
        _ShowPrefix()
        self.verbose_errors = _Switch(
            "verbose-errors", "Show the Python trace of an error of kprobe commands, for a report.", False
        )
        self.strategy = _Choice(
            "strategy",
            "The rung of new kprobes: auto (the best that the profile allows), optimized, boosted or single-step.",
            (AUTO, *reversed([rung.value for rung in Rung])),
        )
        self.profile = _Text(
            "profile", "The profile that 'kprobe attach' uses when it is given none: a name or a path."
        )
        self.watchdog = _Switch(
            "watchdog",
            "At 'kprobe attach' start a process that has the guest run on, without handlers, should gdb be killed.",
            True,
        )

    def all(self) -> tuple[_Switch | _Choice | _Text, ...]:
        """In the order of their names."""
        return self.profile, self.strategy, self.verbose_errors, self.watchdog


_registered: _Registered | None = None


def register() -> None:
    """Define the settings in gdb. Called once, by the plugin."""
    global _registered
    _registered = _Registered()


def settings() -> Settings:
    """The settings as they are now."""
    assert _registered is not None
    strategy = str(_registered.strategy.value)
    return Settings(
        verbose_errors=bool(_registered.verbose_errors.value),
        strategy=None if strategy == AUTO else Rung(strategy),
        profile=str(_registered.profile.value or ""),
        watchdog=bool(_registered.watchdog.value),
    )
