"""What is optimised, and the input that it stands for: pixels, Fourier coefficients, phases, codes of a generator.

A parametrisation has two functions: `init(key)` makes the numbers that are optimised, a pytree called the code, and
`decode(code)` the input. Any object with these two will do. Two more are optional: `log_prior(code)`, which is added to what
is maximised, and `project(code)`, which is applied after every step.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import ArgumentError
from ..surrogate import widen

__all__ = [
    "IMAGENET_COLOURS",
    "Code",
    "Fourier",
    "Maco",
    "Parametrisation",
    "Pixel",
    "Several",
    "bounded",
    "colour_matrix",
    "colours",
]

SPACE = (-3, -2)  # the axes of height and width: channels are last

# The square root of the covariance of the colours of ImageNet, red, green and blue by rows, its longest column of length 1;
# as measured for Lucid (Olah, Mordvintsev, Schubert: Feature Visualization, Distill 2017).
IMAGENET_COLOURS = ((0.5628, 0.1948, 0.0433), (0.5845, 0.0, -0.1082), (0.5845, -0.1948, 0.0649))


class Parametrisation:
    """Base class: `init` and `decode` are needed, a prior and a projection of the code are optional."""

    def init(self, key: jax.Array) -> Any:
        raise NotImplementedError(f"{type(self).__name__} needs a method init(key) that returns the code to start from.")

    def decode(self, code: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} needs a method decode(code) that returns the input.")

    def log_prior(self, code: Any) -> Any:
        return 0.0

    def project(self, code: Any) -> Any:
        return code

    def then(self, *functions: Callable[[Any], Any]) -> "Mapped":
        """With functions applied to the input one after another, such as `colours()` and `bounded(0.0, 1.0)`."""
        return Mapped(self, functions)


@dataclasses.dataclass(frozen=True, eq=False)
class Mapped(Parametrisation):
    """Another parametrisation, and functions of its input; see `Parametrisation.then`."""

    inner: Any
    functions: tuple[Callable[[Any], Any], ...]

    def init(self, key):
        return self.inner.init(key)

    def decode(self, code):
        x = self.inner.decode(code)
        for function in self.functions:
            x = function(x)
        return x

    def log_prior(self, code):
        return prior_of(self.inner, code)

    def project(self, code):
        return projection_of(self.inner, code)


@dataclasses.dataclass(frozen=True, eq=False)
class Pixel(Parametrisation):
    """The input itself: it starts from an image, the mean of the data or of a class, with or without noise.

    Args:
        start: a pytree of floating-point arrays, of the form of the input.
        noise: the standard deviation of what is added to it at the start, in the units of the input.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from relprop.maximization import Pixel
        >>> Pixel(jnp.zeros((28, 28, 1)), noise=0.1).init(jax.random.key(0)).shape
        (28, 28, 1)
    """

    start: Any
    noise: Any = 0.0

    def __post_init__(self):
        object.__setattr__(self, "start", floating(self.start, "start"))

    def init(self, key):
        return noisy(self.start, self.noise, key)

    def decode(self, code):
        return code


@dataclasses.dataclass(frozen=True, eq=False)
class Fourier(Parametrisation):
    """An image by the coefficients of its Fourier transform, scaled so that all frequencies are learned at the same pace.

    The coefficient of frequency f is divided by max(f, 1 / max(height, width))^decay, f in cycles per pixel: a step of the
    optimiser changes low frequencies more, as the spectra of natural images fall with 1 / f. `decode` gives unbounded
    numbers around 0; `.then(colours(), bounded(0.0, 1.0))` makes colours and a range of them.

    Args:
        shape: (..., height, width, channels) of the image.
        decay: the power with which the spectrum falls; 0 scales all frequencies alike.
        noise: the standard deviation of the coefficients at the start.
        start: an image of that shape to start from; by default 0. (It is what `decode` returns: before any `.then`.)

    Source:
        Olah, Mordvintsev, Schubert: Feature Visualization, Distill 2017, "Preconditioning and parameterization", and the
        scale of their code (Lucid).

    Example:
        >>> import jax
        >>> from relprop.maximization import Fourier
        >>> image = Fourier((32, 32, 3))
        >>> image.decode(image.init(jax.random.key(0))).shape
        (32, 32, 3)
    """

    shape: tuple[int, ...]
    decay: float = 1.0
    noise: Any = 0.01
    start: Any = None

    def __post_init__(self):
        image_shape(self.shape)
        if self.start is not None:
            object.__setattr__(self, "start", start_image(self.start, self.shape))

    @property
    def _scale(self):
        """What coefficients are multiplied by, (..., height, width // 2 + 1, 1)."""
        height, width = self.shape[-3:-1]
        frequency = jnp.hypot(jnp.fft.fftfreq(height)[:, None], jnp.fft.rfftfreq(width)[None, :])
        falling = jnp.maximum(frequency, 1 / max(height, width)) ** self.decay
        scale = math.sqrt(height * width) / 4 / falling  # Lucid divides the image by 4
        return scale.reshape((1,) * (len(self.shape) - 3) + (*scale.shape, 1))

    def init(self, key):
        *batch, height, width, channels = self.shape
        if self.start is None:
            zero = jnp.zeros((*batch, height, width // 2 + 1, channels))
            code = {"real": zero, "imag": zero}
        else:
            spectrum = jnp.fft.rfft2(self.start, axes=SPACE)
            scale = self._scale.astype(self.start.dtype)
            code = {"real": spectrum.real / scale, "imag": spectrum.imag / scale}
        return noisy(code, self.noise, key)

    def decode(self, code):
        scale = self._scale.astype(code["real"].dtype)
        spectrum = jax.lax.complex(scale * code["real"], scale * code["imag"])
        return jnp.fft.irfft2(spectrum, s=self.shape[-3:-1], axes=SPACE)


@dataclasses.dataclass(frozen=True, eq=False)
class Maco(Parametrisation):
    """Magnitude-constrained images (MACO): magnitudes of the spectrum are those of real images, phases are optimised.

    No image of this kind has the high frequencies in which activation maximisation hides. The magnitudes are kept exactly:
    phases of a real image are antisymmetric, so those on the edges of the half spectrum, where both of a pair are held, are
    made so. The mean of the image has the sign of that of `start`; without one it is not negative.

    Args:
        magnitude: (height, width // 2 + 1, channels), not negative, the absolute values of `jax.numpy.fft.rfft2`.
        width: that of the image.
        start: an image (height, width, channels) whose phases are the ones to start from; by default all are 0.
        noise: the standard deviation of what is added to the phases at the start, in radians.

    Source:
        Fel et al.: Unlocking Feature Visualization for Deeper Networks with Magnitude Constrained Optimization,
        NeurIPS 2023.

    Example:
        >>> import jax
        >>> from relprop.maximization import Maco
        >>> photographs = jax.random.uniform(jax.random.key(0), (5, 16, 16, 3))
        >>> image = Maco.of(photographs)
        >>> image.decode(image.init(jax.random.key(1))).shape
        (16, 16, 3)
    """

    magnitude: jax.Array
    width: int
    start: Any = None
    noise: Any = 1.0

    def __post_init__(self):
        magnitude = widen(floating(self.magnitude, "magnitude"))
        if magnitude.ndim != 3 or magnitude.shape[1] != self.width // 2 + 1:
            raise ArgumentError(
                f"The magnitude has the shape {magnitude.shape}; for images of width {self.width} it has to be "
                f"(height, {self.width // 2 + 1}, channels), as `Maco.of(images)` takes it from images."
            )
        object.__setattr__(self, "magnitude", magnitude)
        if self.start is not None:
            shape = (magnitude.shape[0], self.width, magnitude.shape[2])
            object.__setattr__(self, "start", start_image(self.start, shape))

    @classmethod
    def of(cls, images: Any, **options: Any) -> Self:
        """With the mean magnitude of images (N, height, width, channels)."""
        images = jnp.asarray(images)
        if images.ndim != 4 or not len(images):
            raise ArgumentError(f"images have the shape {images.shape}, not (N, height, width, channels), one at least.")
        if images.dtype.itemsize < 4:
            images = images.astype(jnp.float32)
        return cls(jnp.abs(jnp.fft.rfft2(images, axes=SPACE)).mean(0), images.shape[2], **options)

    def init(self, key):
        return noisy(jnp.zeros_like(self.magnitude), self.noise, key)

    def decode(self, code):
        columns = jnp.arange(code.shape[1])[:, None]
        paired = (columns == 0) | (2 * columns == self.width)  # where frequencies k and -k are both held
        mirrored = jnp.roll(jnp.flip(code, 0), 1, 0)
        phase = jnp.where(paired[None], (code - mirrored) / math.sqrt(2), code)
        if self.start is not None:
            phase = phase + jnp.angle(jnp.fft.rfft2(self.start, axes=SPACE))
        spectrum = jax.lax.complex(self.magnitude * jnp.cos(phase), self.magnitude * jnp.sin(phase))
        return jnp.fft.irfft2(spectrum, s=(code.shape[0], self.width), axes=(0, 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Code(Parametrisation):
    """The code space of a generator (the decoder of a VAE, the generator of a GAN): x = generator(z).

    Args:
        generator: a function of the code that returns the input, with its parameters filled in.
        start: an array to start from, such as the mean code of a class; an int n stands for `jnp.zeros(n)`.
        noise: the standard deviation of what is added to it at the start.
        prior: a function of the code whose value is added to what is maximised: `L2(strength)` for -strength ||z||^2,
            `L2(strength, z_class)` for -strength ||z - z_class||^2, or any log-density.
        low, high: bounds of the code, numbers or arrays that broadcast to it; it is clipped to them after every step.

    Source:
        Montavon, Samek, Müller 2018, section 3.3; Nguyen et al.: Synthesizing the preferred inputs for neurons in neural
        networks via deep generator networks, NeurIPS 2016 (DGN-AM).

    Example:
        >>> import jax, jax.numpy as jnp, relprop as rp
        >>> code = rp.maximization.Code(jnp.exp, start=3, prior=rp.maximization.L2(0.5))
        >>> rp.maximize(lambda x: jnp.log(x).sum(), code, steps=500).code.round(2)  # z - z^2 / 2 for each
        Array([1., 1., 1.], dtype=float32)
    """

    generator: Callable[[Any], Any]
    start: Any
    noise: Any = 1.0
    prior: Callable[[Any], Any] | None = None
    low: Any = None
    high: Any = None

    def __post_init__(self):
        start = jnp.zeros(self.start) if isinstance(self.start, int | np.integer) else self.start
        object.__setattr__(self, "start", floating(start, "start"))
        for name, function in (("generator", self.generator), ("prior", self.prior)):
            if not (callable(function) or (name == "prior" and function is None)):
                raise ArgumentError(f"{name}={function!r} has to be a function of the code.")
        if self.low is not None and self.high is not None:
            crossed = jnp.asarray(self.low) > jnp.asarray(self.high)
            if not isinstance(crossed, jax.core.Tracer) and crossed.any():
                raise ArgumentError(f"low={self.low} is above high={self.high}: no code lies between these bounds.")

    def init(self, key):
        return noisy(self.start, self.noise, key)

    def decode(self, code):
        return self.generator(code)

    def log_prior(self, code):
        return 0.0 if self.prior is None else self.prior(code)

    def project(self, code):
        if self.low is None and self.high is None:
            return code
        return jax.tree.map(lambda z: jnp.clip(z, self.low, self.high).astype(z.dtype), code)


@dataclasses.dataclass(frozen=True, eq=False)
class Several(Parametrisation):
    """Several inputs that are optimised together, along a new first axis; with `Diversity` they come out different.

    Args:
        parametrisation: of one input. Its noise makes the inputs start from different points.
        count: how many.
    """

    parametrisation: Any
    count: int

    def __post_init__(self):
        object.__setattr__(self, "parametrisation", as_parametrisation(self.parametrisation))
        if not isinstance(self.count, int) or self.count < 1:
            raise ArgumentError(f"count={self.count!r} has to be an integer, 1 at least.")

    def init(self, key):
        return jax.vmap(self.parametrisation.init)(jax.random.split(key, self.count))

    def decode(self, code):
        return jax.vmap(self.parametrisation.decode)(code)

    def log_prior(self, code):
        return jax.vmap(lambda one: total(prior_of(self.parametrisation, one)))(code).sum()

    def project(self, code):
        return jax.vmap(lambda one: projection_of(self.parametrisation, one))(code)


def bounded(low: Any = 0.0, high: Any = 1.0) -> Callable[[jax.Array], jax.Array]:
    """A function that squashes all numbers into (low, high), by a sigmoid; 0 is halfway."""
    return lambda x: low + (high - low) * jax.nn.sigmoid(x)


def colours(matrix: Any = IMAGENET_COLOURS) -> Callable[[jax.Array], jax.Array]:
    """A function from decorrelated colours (..., 3) to red, green and blue, by a matrix (3, 3), by default that of ImageNet.

    Colours of photographs are correlated: mostly they get brighter together. In coordinates that are not, all directions of
    colour are learned at the same pace. `colour_matrix` measures the matrix of other images.
    """
    array = jnp.asarray(matrix)
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise ArgumentError(f"The matrix of colours has the shape {array.shape}, but has to be (channels, channels).")
    return lambda x: jnp.einsum("...i,ji->...j", x, array.astype(x.dtype))


def colour_matrix(images: Any) -> jax.Array:
    """The square root of the covariance of the colours of images (..., channels), its longest column scaled to length 1.

    Columns are the principal directions of colour, the strongest first.
    """
    samples = jnp.asarray(images).reshape(-1, jnp.shape(images)[-1])
    variances, directions = jnp.linalg.eigh(jnp.atleast_2d(jnp.cov(samples, rowvar=False, bias=True)))
    root = (directions * jnp.sqrt(jnp.maximum(variances, 0))[None, :])[:, ::-1]
    length = jnp.linalg.norm(root[:, 0])
    if not isinstance(length, jax.core.Tracer) and not float(length) > 0:
        raise ArgumentError("The colours of these images do not vary: they have no principal directions.")
    return root / length


def as_parametrisation(given: Any) -> Any:
    """What is given, if it has `init` and `decode`; a pytree of arrays stands for itself."""
    if hasattr(given, "init") and hasattr(given, "decode"):
        return given
    return Pixel(given)


def prior_of(parametrisation: Any, code: Any) -> Any:
    """The log-prior of the code, 0 without one."""
    prior = getattr(parametrisation, "log_prior", None)
    return 0.0 if prior is None else prior(code)


def projection_of(parametrisation: Any, code: Any) -> Any:
    """The code as its parametrisation allows it."""
    project = getattr(parametrisation, "project", None)
    return code if project is None else project(code)


def total(prior: Any) -> jax.Array:
    """The sum of a prior over examples that have one each."""
    return jnp.sum(jnp.asarray(prior))


def floating(tree: Any, name: str) -> Any:
    """A pytree of floating-point arrays, or an error."""
    leaves = jax.tree.leaves(tree)
    for leaf in leaves:
        dtype = getattr(leaf, "dtype", type(leaf))
        if not (isinstance(leaf, float) or (hasattr(leaf, "dtype") and jnp.issubdtype(dtype, jnp.floating))):
            raise ArgumentError(
                f"{name} holds {getattr(dtype, '__name__', dtype)}: what is optimised has to be floating-point arrays. Cast "
                "integers, or give an object with the methods init(key) and decode(code)."
            )
    if not leaves:
        raise ArgumentError(f"{name}={tree!r} holds no arrays: there is nothing to optimise.")
    return jax.tree.map(jnp.asarray, tree)


def noisy(tree: Any, noise: Any, key: jax.Array) -> Any:
    """A pytree of arrays with Gaussian noise of a standard deviation `noise`."""
    leaves, form = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        form,
        [
            leaf + jnp.asarray(noise, leaf.dtype) * jax.random.normal(key, leaf.shape, leaf.dtype)
            for leaf, key in zip(leaves, keys, strict=True)
        ],
    )


def image_shape(shape: Any) -> None:
    if len(shape) < 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ArgumentError(f"shape={shape} has to be (height, width, channels), of positive numbers.")


def start_image(start: Any, shape: tuple[int, ...]) -> jax.Array:
    """An image to take a spectrum of: in float32 at least, as there is no Fourier transform of half precision."""
    start = floating(start, "start")
    if jnp.shape(start) != tuple(shape):
        raise ArgumentError(f"The image to start from has the shape {jnp.shape(start)}, but has to have {tuple(shape)}.")
    return widen(start)
