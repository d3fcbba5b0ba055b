"""Oracle: samples (n, *shape) -> Boolean (n,), True where a sample is good."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from gendiff.types import Samples, Valid

Oracle: TypeAlias = Callable[[Samples], Valid]
"""Samples (n, *shape) -> Booleans (n,), True is good."""


class OracleError(ValueError):
    """An oracle gave something else than one Boolean for each sample."""


def label(oracle: Callable[..., Valid], samples: Samples, conditions: Any = None) -> np.ndarray:
    """`oracle(samples)`, checked: one Boolean a sample; numbers are taken if each is exactly 0 or 1.

    With conditions it is `oracle(samples, conditions)`, which may give m Booleans a sample, (n, m).
    """
    n = len(samples)
    given: Any = np.asarray(oracle(samples) if conditions is None else oracle(samples, conditions))
    if conditions is not None and (given.ndim != 2 or len(given) != n):
        raise OracleError(f"oracle: expected m Booleans a sample, shape ({n}, m), given shape {given.shape}")
    if conditions is None and given.shape != (n,):
        raise OracleError(f"oracle: expected one Boolean a sample, shape ({n},), given shape {given.shape}")
    if given.dtype == np.bool_:
        return given
    if not np.issubdtype(given.dtype, np.number):
        raise OracleError(f"oracle: expected Booleans, given dtype {given.dtype}")
    if np.isnan(given.astype(np.float64)).any():
        raise OracleError(f"oracle: expected Booleans, given NaN for {np.isnan(given).sum()} of {n} samples")
    other = given[~np.isin(given, (0, 1))]
    if other.size:
        raise OracleError(f"oracle: expected Booleans, given numbers other than 0 and 1, such as {other[0]}")
    return given.astype(bool)
