"""A processor that is not ours: unicorn as the oracle."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.proof.emulator import Emulator, random_state


@pytest.fixture(scope="session")
def machine() -> Emulator:
    return Emulator()


@pytest.fixture(scope="session")
def state_from() -> Any:
    """A random machine state for a seed."""
    return lambda seed, extended=False: random_state(random.Random(seed), extended=extended)
