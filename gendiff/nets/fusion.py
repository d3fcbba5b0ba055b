"""A barrier against XLA's loop fusion on CPUs."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float


def apart(x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
    """Return x, computed before the loops over pixels that read it.

    Otherwise XLA on a CPU fuses x into the loop and computes an entry again for every pixel.  With several operands it
    also gives up vector instructions, a factor of ten.  An optimisation barrier does not help, because XLA removes it
    before fusion.  On CPUs x is multiplied by the identity, because XLA does not fuse matrix products.
    """
    return apart_p.bind(x)


apart_p = Primitive("apart")
product = lambda x: jnp.dot(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision=lax.Precision.HIGHEST)
apart_p.def_abstract_eval(lambda x: x)
apart_p.def_impl(jax.jit(apart_p.bind))
ad.deflinear2(apart_p, lambda y, x: [apart(y)])
batching.primitive_batchers[apart_p] = lambda operands, axes: (apart(jnp.moveaxis(operands[0], axes[0], 0)), 0)
mlir.register_lowering(apart_p, lambda context, x: [x])
mlir.register_lowering(apart_p, mlir.lower_fun(product, multiple_results=False), platform="cpu")
