"""gendiff: steer diffusion models with potentials.

`import gendiff as gd` gives the five words: processes (`gd.edm`), denoisers (`gd.from_epsilon`), potentials
(`gd.stack`), guidance (`gd.guide`), kernels and samplers (`gd.heun`, `gd.sample`).  Modules are attributes too:
`gd.losses`, `gd.smc`, `gd.training`.  The papers' algorithms are in `gendiff.methods`.  First use imports a word or a
module.
"""

__version__ = "0.2.0"

import sys as _sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gendiff.words import *  # noqa: F403
else:  # because a type checker that sees `__getattr__` accepts any name

    def __getattr__(name: str) -> object:
        """Import a word or a module of the package at its first use."""
        import importlib
        from importlib.util import find_spec

        if name.startswith("_"):
            raise AttributeError(f"module 'gendiff' has no attribute {name!r}")
        if find_spec(f"gendiff.{name}") is not None:
            return importlib.import_module(f"gendiff.{name}")
        words = vars(importlib.import_module("gendiff.words"))
        if name not in words:
            raise AttributeError(f"module 'gendiff' has no attribute {name!r}: dir(gendiff) lists its words")
        globals()[name] = words[name]
        return words[name]

    def __dir__() -> list[str]:
        """List the words, the modules and `__version__`."""
        import importlib
        import pkgutil

        words = vars(importlib.import_module("gendiff.words"))
        modules = (module.name for module in pkgutil.iter_modules(__path__))  # noqa: F405
        return sorted({"__version__", *modules, *(word for word in words if not word.startswith("_"))})


if _sys.argv[:1] == ["-m"]:  # Python is looking for the module of `python -m gendiff...` or `python -m experiments...`
    from gendiff import command as _command

    _command.starting()
