"""The place that a user has named, among the symbols of a Linux kernel; or what is near to it."""

from __future__ import annotations

import difflib

from gdb_kprobe.errors import NeedsTypesError, RefusedError
from gdb_kprobe.guest.guest import Place
from gdb_kprobe.language.spec import Location
from gdb_kprobe.linux.kallsyms import Kallsyms
from gdb_kprobe.model import Reason, Refusal, Symbol, VirtAddr, offset

_KERNEL_HALF = 1 << 63
_CLOSE_NAMES = 3
_LEAST_CONTAINED = 4
"""Characters of a name from which on other names that contain it are proposed."""
_GENERATED = ("__pfx_", "__cfi_", "__ia32_", "__x32_", "__do_sys_", "__se_sys_", "__traceiter_", "__probestub_",
              "trace_", "perf_trace_", "event_")  # fmt: skip
"""How functions begin that macros make beside the one that is meant, which is proposed first."""


def function_at(kallsyms: Kallsyms, addr: VirtAddr) -> Place:
    """Return the function around *addr*; without one, the place is just the address."""
    found = kallsyms.symbol_at(addr)
    if found is None:
        return Place(addr, addr, addr, None)
    symbol, _ = found
    return Place(addr, symbol.addr, kallsyms.end(symbol), symbol)


def resolve(kallsyms: Kallsyms, location: Location, *, has_modules: bool, has_types: bool) -> Place:
    """Return the place that the user named (:meth:`GuestSymbols.resolve`).

    *has_modules*: the kernel may have some; *has_types*: what is in them is known.

    :raises RefusedError: there is no such symbol, there are several, or the offset is outside of it.
    """
    if location.address is not None:
        if location.address < _KERNEL_HALF:
            refusal = Refusal(
                Reason.NOT_TEXT,
                location.address,
                f"{location.address:#x} is an address of user space",
                "a kprobe is for an instruction of the kernel",
            )
            raise RefusedError(f"cannot probe {location}", refusal)
        return function_at(kallsyms, location.address)
    symbol = _symbol(kallsyms, location, has_modules=has_modules, has_types=has_types)
    end = kallsyms.end(symbol)
    addr = offset(symbol.addr, location.offset)
    if not symbol.addr <= addr < end:
        raise RefusedError(
            f"cannot probe {location}",
            Refusal(
                Reason.OFFSET_OUTSIDE_SYMBOL,
                addr,
                f"{symbol} is {end - symbol.addr} bytes long",
                f"offsets 0 to {end - symbol.addr - 1:#x} are inside",
            ),
        )
    return Place(addr, symbol.addr, end, symbol)


def _symbol(kallsyms: Kallsyms, location: Location, *, has_modules: bool, has_types: bool) -> Symbol:
    what = f"cannot probe {location}"
    all_found = kallsyms.lookup(location.symbol)
    found = [symbol for symbol in all_found if symbol.is_text and location.module in ("", symbol.module)]
    if len({symbol.addr for symbol in found}) == 1:
        return found[0]
    if found:
        places = ", ".join(f"{symbol.addr:#x}" + (f" [{symbol.module}]" if symbol.module else "") for symbol in found)
        raise RefusedError(
            what,
            Refusal(
                Reason.AMBIGUOUS_SYMBOL,
                found[0].addr,
                f"{len(found)} functions are called {location.symbol}: {places}",
                "name the one you mean by its address, or by MODULE:SYMBOL",
            ),
        )
    elsewhere = next((symbol for symbol in all_found if symbol.is_text), None)
    if elsewhere is not None:
        home = f"module {elsewhere.module}" if elsewhere.module else "the core kernel"
        detail = f"{location.module} has no {location.symbol}; it is in {home}"
        prefix = f"{elsewhere.module}:" if elsewhere.module else ""
        refusal = Refusal(Reason.NO_SYMBOL, elsewhere.addr, detail, f"write {prefix}{location.symbol}")
        raise RefusedError(what, refusal)
    if all_found:
        other = all_found[0]
        detail = f"{location.symbol} is data (type {other.type})"
        hint = "a probe needs the address of an instruction: name a function"
        raise RefusedError(what, Refusal(Reason.NOT_TEXT, other.addr, detail, hint))
    if location.module and not has_modules:
        detail = f"there is no module {location.module}: the guest's kernel has none (no CONFIG_MODULES)"
        hint = f"what is built in is probed by its name alone: {location.symbol}"
        raise RefusedError(what, Refusal(Reason.NO_SYMBOL, VirtAddr(0), detail, hint))
    close = _close_names(kallsyms, location.symbol)
    detail = f"{location.symbol} is not in kallsyms"
    hint = f"did you mean {', '.join(close)}?" if close else "'kprobe add PREFIX<TAB>' completes symbols"
    if has_modules and not has_types:
        error = NeedsTypesError("what is in modules")
        detail = f"{location.symbol} is not in the core kernel's kallsyms, and {error.message}"
        hint = f"{hint} If it is in a module, {error.hint}" if close and not location.module else error.hint
    raise RefusedError(what, Refusal(Reason.NO_SYMBOL, VirtAddr(0), detail, hint))


def _close_names(kallsyms: Kallsyms, name: str) -> list[str]:
    """Functions whose names are like *name*.

    The same in another case; else those that contain it, the shortest first; else those spelled like it, which are
    looked for only among those that share its beginning, for there are 100,000.
    """
    lower = name.lower()
    functions = {symbol.name for symbol in kallsyms if symbol.is_text}
    same = sorted(other for other in functions if other.lower() == lower)
    if same:
        return same[:_CLOSE_NAMES]
    containing = [other for other in functions if lower in other.lower()] if len(name) >= _LEAST_CONTAINED else []
    if containing:
        return sorted(containing, key=lambda other: (other.startswith(_GENERATED), len(other), other))[:_CLOSE_NAMES]
    beginning = lower[: max(3, len(name) // 2)]
    near = [other for other in functions if other.lower().startswith(beginning)]
    return difflib.get_close_matches(lower, sorted(near)[:5000], n=_CLOSE_NAMES)
