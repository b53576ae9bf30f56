"""Strictness that users do not get: mixed ranks, mixed dtypes and warnings are errors here."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def strict_dtypes():
    """For tests of jaxnorm alone: Flax itself mixes dtypes."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
