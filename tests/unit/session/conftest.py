"""The toy machine, with a session on it that reaches it directly, and by packets under KVM's rules."""

from __future__ import annotations

import functools

import pytest

from tests.support.toy import Toy, ToyMachine, ToyWith, make_toy


@pytest.fixture
def machine() -> ToyMachine:
    return ToyMachine()


@pytest.fixture(params=["direct", "kvm"])
def wired(request: pytest.FixtureRequest) -> bool:
    """Whether the session reaches the machine by packets, to a stub over KVM."""
    return bool(request.param == "kvm")


@pytest.fixture
def toy(machine: ToyMachine, wired: bool) -> Toy:
    return make_toy(machine, wired=wired)


@pytest.fixture
def toy_with(wired: bool) -> ToyWith:
    """A function from a machine (and rungs) to a :class:`Toy`: also a second session on the same machine."""
    return functools.partial(make_toy, wired=wired)
