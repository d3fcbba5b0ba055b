"""The words of `import gendiff as gd`.

`gendiff` imports this file when a word is first used, because JAX and Optax take seconds to import and a command
prepares its signals first.  `X as X` tells type checkers that a word is public.
"""

# ruff: noqa: I001 (its fix gives every `X as X` its own statement)

from gendiff.denoiser import (
    Denoiser as Denoiser,
    Model as Model,
    from_edm as from_edm,
    from_data_time as from_data_time,
    from_epsilon as from_epsilon,
    from_score as from_score,
    from_v as from_v,
    from_velocity as from_velocity,
    to_epsilon as to_epsilon,
    to_score as to_score,
    to_v as to_v,
    zero_based as zero_based,
)
from gendiff.guidance import (
    Guidance as Guidance,
    accepted as accepted,
    backward as backward,
    chain as chain,
    classifier_free as classifier_free,
    clip as clip,
    guide as guide,
    guide_mean as guide_mean,
    inpaint as inpaint,
    normal_draws as normal_draws,
    steer as steer,
    universal as universal,
)
from gendiff.potential import (
    Potential as Potential,
    clear as clear,
    limited as limited,
    log_probability as log_probability,
    scaled as scaled,
    stack as stack,
    total as total,
)
from gendiff.process import (
    Process as Process,
    continuous as continuous,
    cosine_betas as cosine_betas,
    ddpm as ddpm,
    edm as edm,
    flow as flow,
    linear_betas as linear_betas,
    perturb as perturb,
    sqrt_linear_betas as sqrt_linear_betas,
    zero_terminal as zero_terminal,
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
