"""What the two owners of a place can do, as values; and sequences of it by chance.

A sequence is text, one step a line or between semicolons, so that one that was found can be run again as it is. A step
that makes no sense where it stands does nothing: any part of a sequence is a sequence, which is how a long one that
fails is made short.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

EVENTS = ("g0", "g1", "g2")
"""Of the guest's own events."""
PROBES = ("ours0", "ours1", "ours2")
TRACERS = ("function", "function_graph", "nop")
BPF = ("fentry", "fexit")
"""Where a BPF program of the guest's is called."""
STRATEGIES = ("auto", "auto", "auto", "optimized", "boosted", "single-step")
HOW = ("", "", "", "disabled", "true", "false")
"""How a probe of ours is added: disabled, or with a condition that is always true or never."""
MOST_CALLS = 9
_LENGTHS = (5, 14)


@dataclass(frozen=True, slots=True)
class Step:
    """One step: who does what (``guest.enable``), and to which."""

    verb: str
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.verb, *self.words))


Sequence = tuple[Step, ...]


def parse(text: str) -> Sequence:
    """The steps that :func:`written` has written."""
    lines = (line.split() for line in text.replace(";", "\n").splitlines())
    return tuple(Step(words[0], tuple(words[1:])) for words in lines if words)


def written(sequence: Iterable[Step]) -> str:
    """A sequence as text."""
    return "; ".join(map(str, sequence))


@dataclass(frozen=True, slots=True)
class Field:
    """Where the two meet: *functions*, each with the number of its places; and what the guest has."""

    functions: dict[str, int]
    has_fprobe: bool
    has_bpf: bool = False
    has_live_patch: bool = False


@dataclass
class Shadow:
    """What there is, as far as a sequence itself tells."""

    events: dict[str, bool] = field(default_factory=dict)
    probes: dict[str, bool] = field(default_factory=dict)
    tracer: str = "nop"
    bpf: bool = False
    patched: bool = False
    is_killed: bool = False

    def follow(self, step: Step) -> None:
        """Have seen *step*."""
        words = step.words
        match step.verb:
            case "guest.define":
                self.events[words[0]] = False
            case "guest.enable" | "guest.disable":
                self.events[words[0]] = step.verb == "guest.enable"
            case "guest.remove":
                del self.events[words[0]]
            case "guest.tracer":
                self.tracer = words[0]
            case "guest.bpf" | "guest.unbpf":
                self.bpf = step.verb == "guest.bpf"
            case "guest.patch" | "guest.unpatch":
                self.patched = step.verb == "guest.patch"
            case "our.add":
                self.probes[words[0]] = "disabled" not in words
            case "our.enable" | "our.disable":
                self.probes[words[0]] = step.verb == "our.enable"
            case "our.delete" if words[0] != "all":
                del self.probes[words[0]]
            case "our.kill":
                self.is_killed = True
            case "our.adopt":
                self.is_killed = False
            case "our.restore" | "our.attach" | "our.detach" | "our.delete":
                self.is_killed = False
                self.probes.clear()


def sequence(chosen: random.Random, ground: Field) -> Sequence:
    """A sequence by chance, which ends with both owners gone."""
    function = chosen.choice(sorted(ground.functions))
    steps = [Step("on", (function,))]
    shadow = Shadow()
    for _ in range(chosen.randint(*_LENGTHS)):
        steps.append(next_step(chosen, shadow, ground.functions[function], ground))
    steps.append(_call(chosen))
    ours = "restore" if shadow.is_killed else chosen.choice(("delete",) * 7 + ("detach",))
    ending = [Step("guest.clear"), Step(f"our.{ours}", ("all",) if ours == "delete" else ())]
    chosen.shuffle(ending)
    steps += [ending[0], _call(chosen), ending[1], _call(chosen)]
    return tuple(steps)


def next_step(chosen: random.Random, shadow: Shadow, places: int, ground: Field) -> Step:
    """One more step, at a function of so many places, that makes sense after those that *shadow* has seen."""
    options: list[tuple[float, Step]] = [(4, _call(chosen))]

    def add(weight: float, verb: str, *words: str) -> None:
        options.append((weight, Step(verb, words)))

    # The first places are where the function begins; what is behind matters as far as a window reaches.
    place = str(min(chosen.randrange(places), chosen.randrange(places)))
    if free := [name for name in EVENTS if name not in shadow.events]:
        kind = chosen.choice(("p", "p", "p", "r", *(("f",) if ground.has_fprobe else ())))
        add(4, "guest.define", free[0], kind, place if kind == "p" else "0")
    if off := [name for name, enabled in shadow.events.items() if not enabled]:
        add(5, "guest.enable", chosen.choice(off))
        add(1.5, "guest.remove", chosen.choice(off))
    if on := [name for name, enabled in shadow.events.items() if enabled]:
        add(2, "guest.disable", chosen.choice(on))
        add(1.5, "guest.settle")
    add(2, "guest.tracer", chosen.choice([tracer for tracer in TRACERS if tracer != shadow.tracer]))
    if ground.has_bpf:
        add(*((2, "guest.unbpf") if shadow.bpf else (1, "guest.bpf", chosen.choice(BPF))))
    if ground.has_live_patch:
        add(*((1.5, "guest.unpatch") if shadow.patched else (0.4, "guest.patch")))
    if shadow.is_killed:
        add(3, "our.adopt")
        add(1, "our.restore")
        add(0.5, "our.attach")
    else:
        if free := [name for name in PROBES if name not in shadow.probes]:
            add(5, "our.add", free[0], place, chosen.choice(STRATEGIES), *filter(None, (chosen.choice(HOW),)))
        if shadow.probes:
            name = chosen.choice(sorted(shadow.probes))
            live = chosen.choice(((), ("live",)))
            if shadow.probes[name]:
                add(1, "our.disable", name, *live)
            else:
                add(2, "our.enable", name, *live)
            add(1.5, "our.delete", name)
            add(2, "our.stop")
            # A new session takes longer than many steps.
            add(0.2, "our.detach")
            add(0.4, "our.kill", chosen.choice(("running", "stopped")))
    step = chosen.choices([option for _, option in options], [weight for weight, _ in options])[0]
    shadow.follow(step)
    return step


def _call(chosen: random.Random) -> Step:
    return Step("call", (str(chosen.randint(1, MOST_CALLS)),))
