"""gendiff: steer diffusion models with potentials.

`process`, `denoiser`, `potential`, `guidance` and `sampling` are the vocabulary; `losses`, `likelihood`, `smc`,
`training` and `distributed` work on it; `methods` holds each paper's algorithm.
"""

__version__ = "0.1.0"

import sys as _sys

if _sys.argv[:1] == ["-m"]:  # while Python looks for the module of `python -m gendiff...` or `python -m experiments...`
    from gendiff import command as _command

    _command.starting()
