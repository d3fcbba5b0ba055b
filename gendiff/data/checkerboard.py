"""Points uniform on the filled cells of a checkerboard, generated in memory."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gendiff import check
from gendiff.types import PRNGKey


@partial(jax.jit, static_argnums=(1, 2, 3))
def draw(key: PRNGKey, n: int, cells: int = 4, half_width: float = 1.0) -> Float[Array, "n 2"]:
    """Draw n points, uniform on the filled cells of a board on [-half_width, half_width)^2.

    The board has cells x cells cells; a cell is filled if column + row is even.  The density of the points is 1 / area,
    with area about 2 half_width^2, so the largest possible mean log-likelihood is -ln(area).

    Raises:
      ValueError: `n` is negative, `cells` is below 1, or `half_width` is not positive.
    """
    check.number("checkerboard: n", n, at_least=0, whole=True)
    check.number("checkerboard: cells", cells, at_least=1, whole=True)
    check.number("checkerboard: half_width", half_width, above=0)
    filled = jnp.array([(i, j) for i in range(cells) for j in range(cells) if (i + j) % 2 == 0])
    cell_key, place_key = jax.random.split(key)
    corner = filled[jax.random.randint(cell_key, (n,), 0, len(filled))]
    u = corner + jax.random.uniform(place_key, (n, 2))
    return (2 * u / cells - 1) * half_width
