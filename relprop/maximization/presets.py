"""Settings of published methods, and starting points for several facets of one class."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..errors import ArgumentError
from ..progress import require
from .parametrisations import Code

__all__ = ["dgn_am", "facets", "mean_normalized"]


def mean_normalized() -> optax.GradientTransformation:
    """An optax transformation that divides gradients by their mean absolute value, as DGN-AM and DeepDream do."""

    def normalized(gradient, params=None):
        size = jax.tree.map(lambda g: jnp.abs(g).mean(), gradient)
        return jax.tree.map(lambda g, s: g / jnp.where(s > 0, s, jnp.ones_like(s)), gradient, size)

    return optax.stateless(normalized)


def dgn_am(
    generator: Any,
    start: Any,
    high: Any,
    low: Any = 0.0,
    *,
    steps: int = 200,
    learning_rate: tuple[float, float] = (8.0, 1e-10),
    decay: float = 0.99,
    noise: float = 1.0,
) -> dict[str, Any]:
    """Activation maximisation with a deep generator network (DGN-AM): arguments for `maximize(objective, **dgn_am(...))`.

    Each step moves the code by the learning rate times its gradient, divided by the gradient's mean absolute value. The
    learning rate falls linearly over the steps. Then the code is clipped to [low, high], and multiplied by `decay`.

    The authors normalise the gradient a second time, at the image between network and generator, which changes its length
    only: the same direction arrives at the code.

    Args:
        generator: a function of the code.
        start: the code to start from, or its length n, for 0; noise of that standard deviation is added. The start is
            clipped and multiplied by `decay`, too.
        high, low: bounds of the code. The authors' code is an activation behind a relu, with low = 0 and high the mean plus
            3 standard deviations of each unit over a dataset.
        steps, learning_rate, decay, noise: by default those of the authors, for their generator of fc6 of CaffeNet.

    Source:
        Nguyen, Dosovitskiy, Yosinski, Brox, Clune: Synthesizing the preferred inputs for neurons in neural networks via deep
        generator networks, NeurIPS 2016, and their code, github.com/Evolving-AI-Lab/synthesizing.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> settings = rp.maximization.dgn_am(jnp.tanh, start=3, high=2.0)
        >>> rp.maximize(lambda x: x.sum(), **settings).input.shape
        (3,)
    """
    first, last = learning_rate
    if not 0 < decay <= 1:
        raise ArgumentError(f"decay={decay} has to be above 0 and at most 1; the code is multiplied by it at each step.")
    schedule = optax.linear_schedule(first, last, steps)

    def decayed(code):  # `Code.project` has clipped it before
        return jax.tree.map(lambda z: jnp.asarray(decay, z.dtype) * z, code)

    return {
        "parametrisation": Code(generator, start, noise, low=low, high=high),
        "optimizer": optax.chain(mean_normalized(), optax.scale_by_learning_rate(schedule)),
        "steps": steps,
        "projection": decayed,
    }


def facets(images: Any, count: int, *, features: Any = None, nearest: int = 15, seed: int = 0) -> jax.Array:
    """Starting points for several prototypes of one class that differ: means of images that are alike.

    The images of a class are clustered (k-means), and for each cluster the `nearest` images to its centre are averaged:
    start from each of them, `maximize(lambda x, _: objective(x), ForEach(Pixel), each=facets(images, 4))`. Needs
    scikit-learn (extra `examples`).

    Args:
        images: (N, ...), of one class.
        count: how many facets.
        features: (N, ...), what is compared: activations of a layer; by default the images.
        nearest: how many images are averaged, at most.
        seed: of k-means.

    Returns:
        (count, ...), the largest cluster first.

    Source:
        Nguyen, Yosinski, Clune: Multifaceted feature visualization, 2016 (arXiv:1602.03616).

    Example:
        >>> import numpy as np
        >>> from relprop.maximization import facets
        >>> facets(np.array([[0.0], [1.0], [2.0], [9.0], [9.0]], np.float32), 2).tolist()
        [[1.0], [9.0]]
    """
    images = jnp.asarray(images)
    compared = np.asarray(images if features is None else features)
    if len(compared) != len(images):
        raise ArgumentError(f"There are {len(images)} images, but features of {len(compared)}.")
    if not 1 <= count <= len(images) or nearest < 1:
        raise ArgumentError(
            f"count={count} has to be between 1 and the number of images, {len(images)}, and nearest={nearest} positive."
        )
    require("sklearn", "facets", "examples")
    from sklearn.cluster import KMeans

    flat = compared.reshape(len(compared), -1).astype(np.float64)
    distinct = len(np.unique(flat, axis=0))
    if distinct < count:
        raise ArgumentError(
            f"Only {distinct} of {len(flat)} images (or their features) are distinct: too few for count={count}."
        )
    clusters = KMeans(count, n_init=4, random_state=seed).fit(flat)
    found = []
    for cluster in np.argsort(-np.bincount(clusters.labels_, minlength=count), kind="stable"):
        members = np.flatnonzero(clusters.labels_ == cluster)
        distance = np.linalg.norm(flat[members] - clusters.cluster_centers_[cluster], axis=1)
        found.append(images[members[np.argsort(distance, kind="stable")[:nearest]]].mean(0))
    return jnp.stack(found)
