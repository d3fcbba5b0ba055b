"""gendiff: steer diffusion models with potentials.

`process`, `denoiser`, `potential`, `guidance` and `sampling` are the vocabulary; `losses`, `likelihood`, `smc`,
`training` and `distributed` work on it; `methods` holds each paper's algorithm.
"""

__version__ = "0.1.0"
