"""Static values: functions that compare by their factory's arguments, so that equal ones share a compiled program.

JAX compiles a program for every new value of its static arguments, and two closures are never equal.  Functions that a
factory marked `@by_value` returns are equal if the factory's arguments are equal:

    @by_value
    def edm_weight(data_std):
        return lambda t: 1 / t**2 + 1 / data_std**2

    edm_weight(0.5) == edm_weight(0.5) != edm_weight(0.6)

Models, losses, processes and tasks are such functions; problems and settings are tuples of them.  Flax modules compare
by their fields, and so do their methods here.  Arrays of JAX are arguments of programs, never parts of a static value.
"""

import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import numpy as np

F = TypeVar("F", bound=Callable)


class Value:
    """A function that equals another one of the same factory and equal arguments."""

    def __init__(self, factory: Callable, arguments: dict[str, Any], function: Callable) -> None:
        self._factory, self._arguments, self._function = factory, arguments, function
        self.__name__ = getattr(factory, "__name__", "value")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the function."""
        return self._function(*arguments, **named)

    @functools.cached_property
    def _key(self) -> Hashable:
        return tuple((name, comparable(argument)) for name, argument in self._arguments.items())

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self._factory, self._key))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Value):
            return NotImplemented
        return self._hash == other._hash and self._factory == other._factory and self._key == other._key

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={argument!r}" for name, argument in self._arguments.items())
        return f"{self.__name__}({arguments})"


def by_value(factory: F) -> F:
    """Decorate a pure function that returns a function: the result compares by the factory's arguments.

    Arguments may be numbers, text, functions, tuples, dicts, Flax modules and their methods, and NumPy arrays, which
    the caller must not change afterwards.

    Raises (when the result is hashed, as by `jax.jit`):
      TypeError: an argument has no hash, such as a JAX array: pass arrays to the compiled program instead.
    """
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def make(*arguments: Any, **named: Any) -> Value:
        bound = signature.bind(*arguments, **named)
        bound.apply_defaults()
        return Value(factory, dict(bound.arguments), factory(*arguments, **named))

    return cast(F, make)


@by_value
def partial(function: Callable, *arguments: Any, **named: Any) -> Callable:
    """`functools.partial` that compares by value; a method compares by its object's fields."""
    return functools.partial(function, *arguments, **named)


def comparable(argument: Any) -> Hashable:
    """The stand-in for an argument in comparisons and hashes."""
    if isinstance(argument, np.ndarray):
        return "array", argument.shape, argument.dtype.str, argument.tobytes()
    if isinstance(argument, bool | int | float):  # because 1, 1.0 and True are equal, but give different programs
        return type(argument), argument
    if isinstance(argument, dict):
        return "dict", tuple((key, comparable(value)) for key, value in sorted(argument.items()))
    if isinstance(argument, tuple | list):
        return type(argument), tuple(map(comparable, argument))
    if isinstance(argument, functools.partial):
        return "partial", comparable(argument.func), comparable(argument.args), comparable(argument.keywords)
    if inspect.ismethod(argument):  # Python compares the objects of methods by identity
        return "method", argument.__self__, argument.__func__
    return cast(Hashable, argument)
