"""Two real handwritten digits, one over the other: three tasks that get in each
other's way.

Multi-MNIST in the size of scikit-learn's digits (1797 images of 8 x 8 pixels that ship
inside the package). As there, the left digit stands at the top left of a canvas, the
right one at the bottom right, and where they overlap the brighter pixel counts. 28 x 28
digits shifted by 6 pixels become 8 x 8 digits shifted by 2, on a 10 x 10 canvas.

======  ==============================================  =========================
task    what                                            target
======  ==============================================  =========================
``CL``  classify the top-left digit                     its label
``CR``  classify the bottom-right digit                 its label
``RR``  reconstruct the bottom-right digit, unshifted   its 64 pixels, in [0, 1]
======  ==============================================  =========================

``CL_RR`` is the pair that conflicts most: to know the left digit is to forget the right
one's pixels (Nakamura, Grassi & Wolf 2022, arXiv:2204.06698).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

TASKS = ("CL", "CR", "RR")

SIDE = 8
SHIFT = 2
CANVAS = SIDE + SHIFT

_BRIGHTEST = 16.0  # scikit-learn's digits count the set pixels of 4 x 4 blocks


class Source(NamedTuple):
    """Single digits of one split.

    Attributes:
      images: pixels in [0, 1].
      labels: 0 to 9.
      rows: which of the 1797 images each one is.
    """

    images: Float[Array, "digits 8 8"]
    labels: Int[Array, " digits"]
    rows: Int[Array, " digits"]


class Sources(NamedTuple):
    """The fixed split, by source image: no image stands in two of them."""

    train: Source
    validation: Source
    test: Source


class Pairs(NamedTuple):
    """Overlaid digits, with the target of every task.

    Attributes:
      canvas: what the network sees, in [0, 1].
      targets: one array a task: labels ``[pairs]``, or ``[pairs, 64]`` pixels.
      rows: the left and the right image's place among the 1797.
    """

    canvas: Float[Array, "pairs 10 10"]
    targets: dict[str, Array]
    rows: Int[Array, "pairs 2"]


def parse_tasks(name: str) -> tuple[str, ...]:
    """The tasks that a name such as ``CL_RR`` joins, in sorted order.

    Sorted, because that is the order in which JAX sees a dict of losses.

    Args:
      name: one or more of `TASKS`, joined by underscores; case does not matter.

    Raises:
      ValueError: for an unknown task, or one named twice.

    Example:
      >>> from mtl_optax.examples.digits import parse_tasks
      >>> parse_tasks("RR_CL")
      ('CL', 'RR')
    """
    tasks = tuple(name.upper().split("_"))
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or len(set(tasks)) < len(tasks):
        raise ValueError(
            f"unknown tasks {name!r}: join any of {', '.join(TASKS)} by underscores, "
            "each once, for example CL_RR."
        )
    return tuple(sorted(tasks))


def load_sources() -> Sources:
    """scikit-learn's digits in three fixed parts: about 60, 20 and 20 percent.

    The split needs no random number: of each class, every fourth of five images (in the
    order of the data set) goes to validation and every fifth to the test part, so all
    three have the same share of every digit and of the writers, who follow each other
    in the data set.

    Returns:
      `Sources`; 1085, 357 and 355 images.

    Example:
      >>> from mtl_optax.examples.digits import load_sources
      >>> sources = load_sources()
      >>> [len(part.labels) for part in sources]
      [1085, 357, 355]
      >>> sources.train.images.shape, float(sources.train.images.max())
      ((1085, 8, 8), 1.0)
    """
    from sklearn.datasets import load_digits  # an extra, and slow to import

    digits = load_digits()
    labels = digits.target.astype(np.int32)
    of_class = np.zeros(len(labels), int)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        of_class[members] = np.arange(len(members))
    fold = of_class % 5

    def part(chosen: np.ndarray) -> Source:
        rows = np.flatnonzero(chosen)
        return Source(
            images=jnp.asarray(digits.images[rows] / _BRIGHTEST, jnp.float32),
            labels=jnp.asarray(labels[rows]),
            rows=jnp.asarray(rows, jnp.int32),
        )

    return Sources(part(fold < 3), part(fold == 3), part(fold == 4))


def overlay(
    left: Float[Array, "*pairs 8 8"], right: Float[Array, "*pairs 8 8"]
) -> Float[Array, "*pairs 10 10"]:
    """Puts `left` at the top left and `right` at the bottom right of one canvas.

    Where they overlap, the brighter pixel counts, as in Multi-MNIST.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.examples.digits import overlay
      >>> canvas = overlay(jnp.full((8, 8), 0.25), jnp.full((8, 8), 0.75))
      >>> canvas.shape, canvas[0, 0].item(), canvas[5, 5].item(), canvas[0, 9].item()
      ((10, 10), 0.25, 0.75, 0.0)
    """
    around = [(0, 0)] * (left.ndim - 2)
    top_left = jnp.pad(left, [*around, (0, SHIFT), (0, SHIFT)])
    bottom_right = jnp.pad(right, [*around, (SHIFT, 0), (SHIFT, 0)])
    return jnp.maximum(top_left, bottom_right)


def draw_pairs(source: Source, key: Key[Array, ""], num_pairs: int) -> Pairs:
    """Overlays digits of one split in pairs.

    The left digits run through the split, over and over; each is joined by a right one
    drawn at random among all others of the same split.

    Args:
      source: the split to draw from.
      key: the same key gives the same pairs.
      num_pairs: how many, static.

    Returns:
      `Pairs`, with the targets of all three tasks.

    Example:
      >>> import jax
      >>> from mtl_optax.examples.digits import draw_pairs, load_sources
      >>> pairs = draw_pairs(load_sources().test, jax.random.key(0), 500)
      >>> pairs.canvas.shape, {k: v.shape for k, v in pairs.targets.items()}
      ((500, 10, 10), {'CL': (500,), 'CR': (500,), 'RR': (500, 64)})
    """
    digits = source.labels.shape[0]
    left = jnp.arange(num_pairs) % digits
    right = (left + jax.random.randint(key, (num_pairs,), 1, digits)) % digits
    return Pairs(
        canvas=overlay(source.images[left], source.images[right]),
        targets={
            "CL": source.labels[left],
            "CR": source.labels[right],
            "RR": source.images[right].reshape(num_pairs, -1),
        },
        rows=jnp.stack([source.rows[left], source.rows[right]], axis=1),
    )
