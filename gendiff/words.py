"""The words of `import gendiff as gd`.

`gendiff` imports this file when a word is first used, because JAX and Optax take seconds to import and a command
prepares its signals first.  `X as X` tells type checkers that a word is public.
"""

# ruff: noqa: I001 (its fix gives every `X as X` its own statement)

from gendiff.denoiser import (
    Denoiser as Denoiser,
    Model as Model,
    from_edm as from_edm,
    from_epsilon as from_epsilon,
    from_score as from_score,
    from_v as from_v,
    to_epsilon as to_epsilon,
    to_score as to_score,
    to_v as to_v,
    zero_based as zero_based,
)
from gendiff.guidance import (
    Guidance as Guidance,
    backward as backward,
    chain as chain,
    clip as clip,
    guide as guide,
    guide_mean as guide_mean,
    inpaint as inpaint,
    steer as steer,
    universal as universal,
)
from gendiff.potential import (
    Potential as Potential,
    limited as limited,
    log_probability as log_probability,
    scaled as scaled,
    stack as stack,
    total as total,
)
from gendiff.process import (
    Process as Process,
    cosine_betas as cosine_betas,
    ddpm as ddpm,
    edm as edm,
    linear_betas as linear_betas,
    perturb as perturb,
    sqrt_linear_betas as sqrt_linear_betas,
)
from gendiff.sampling import (
    Kernel as Kernel,
    ancestral as ancestral,
    ddim as ddim,
    heun as heun,
    pinned as pinned,
    recurrent as recurrent,
    refine as refine,
    sample as sample,
    states as states,
)
