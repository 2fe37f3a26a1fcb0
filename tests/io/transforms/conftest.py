"""Fixtures of transforms."""

from __future__ import annotations

import pytest

from regtool.geometry.grid import Grid
from tests.conftest import random_grid


@pytest.fixture
def grid(ndim: int, orientation: str) -> Grid:
    return random_grid(ndim, orientation, seed=11)
