"""The type of oracles, samples (n, *shape) -> Booleans (n,) with True for good, and the check of their verdicts."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from gendiff.types import Samples, Valid

Oracle: TypeAlias = Callable[[Samples], Valid]
"""Samples (n, *shape) -> Booleans (n,), True is good."""


class OracleError(ValueError):
    """An oracle did not return a Boolean per sample."""


def label(oracle: Callable[..., Valid], samples: Samples, conditions: Any = None) -> np.ndarray:
    """Call the oracle and check its verdicts (n,): Booleans, or numbers 0 and 1.

    With conditions, call `oracle(samples, conditions)` and check verdicts (n, m), m per sample.

    Raises:
      OracleError: the verdicts have another shape or type, or other numbers.
    """
    n = len(samples)
    verdicts: Any = np.asarray(oracle(samples) if conditions is None else oracle(samples, conditions))
    if conditions is not None and (verdicts.ndim != 2 or len(verdicts) != n):
        raise OracleError(f"oracle: verdicts must be m Booleans a sample, shape ({n}, m), got shape {verdicts.shape}")
    if conditions is None and verdicts.shape != (n,):
        raise OracleError(f"oracle: verdicts must be one Boolean a sample, shape ({n},), got shape {verdicts.shape}")
    if verdicts.dtype == np.bool_:
        return verdicts
    if not np.issubdtype(verdicts.dtype, np.number):
        raise OracleError(f"oracle: verdicts must be Booleans, got dtype {verdicts.dtype}")
    if np.isnan(verdicts.astype(np.float64)).any():
        raise OracleError(f"oracle: verdicts must be Booleans, got NaN for {np.isnan(verdicts).sum()} of {n} samples")
    wrong = verdicts[~np.isin(verdicts, (0, 1))]
    if wrong.size:
        raise OracleError(f"oracle: verdicts must be Booleans, got numbers other than 0 and 1, such as {wrong[0]}")
    return verdicts.astype(bool)
