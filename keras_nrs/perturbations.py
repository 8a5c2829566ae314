"""Distributions of the weight perturbation delta."""

import itertools
import math
from collections.abc import Callable
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import keras
from keras import ops

from keras_nrs._checks import check_choice
from keras_nrs._checks import check_scalar
from keras_nrs._checks import check_seed
from keras_nrs.backend import RandomStream

Tensor = Any

RADII = ("volume", "uniform", "sphere")
NOISES = ("normal", "rademacher")

# Keeps delta inside the ball despite float32 rounding, for up to about 1e9 elements.
_ROUNDING_MARGIN = 1 - 2.0**-20

# Indices have 31 bits: more elements than this need one draw for each weight.
_MAX_DRAW = 2**31


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all tensors together."""
    return ops.sqrt(sum(ops.sum(ops.square(tensor)) for tensor in tensors))


def _reciprocal(norm: Tensor) -> Tensor:
    """1 / norm, and 0 for a norm of 0."""
    is_zero = norm == 0
    return ops.where(is_zero, 0.0 * norm, 1.0 / ops.where(is_zero, 1.0 + norm, norm))


def _common_dtype(tensors: Sequence[Any]) -> str:
    """float64 if any tensor has it, otherwise float32."""
    dtypes = {keras.backend.standardize_dtype(tensor.dtype) for tensor in tensors}
    return "float64" if "float64" in dtypes else "float32"


def _num_elements(tensors: Sequence[Tensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _shaped_like(weights: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, or parts of one flat tensor, in the shapes of the weights."""
    if len(tensors) == len(weights):
        return [ops.reshape(t, w.shape) for w, t in zip(weights, tensors, strict=True)]
    (flat,) = tensors
    ends = list(itertools.accumulate(math.prod(w.shape) for w in weights))
    return [
        ops.reshape(flat[start:end], w.shape)
        for w, start, end in zip(weights, [0, *ends], ends, strict=False)
    ]


def random_stream(rng: Any) -> RandomStream:
    """A `RandomStream` of an int, a `SeedGenerator`, a key, or another stream."""
    if isinstance(rng, RandomStream):
        return rng
    if isinstance(rng, Integral):
        rng = keras.random.SeedGenerator(check_seed("rng", rng))
    if isinstance(rng, keras.random.SeedGenerator):
        rng = rng.next()
    if tuple(getattr(rng, "shape", ())) != (2,):
        raise TypeError(
            "`rng` must be an int, a keras.random.SeedGenerator, or a key of shape "
            f"(2,) from its next(). Received: rng={rng!r}."
        )
    return RandomStream(rng)


class Perturbation:
    """Base class of the distributions of delta.

    At every step an `NRSModel` calls `sample()` with the trainable weights, and adds
    the result to them for the perturbed pass. delta is a constant of the step: no
    gradient flows through it.

    To make your own, subclass this and implement `sample()`. To save the model, add
    `get_config()` and `@keras.saving.register_keras_serializable()`.

    Args:
        where: `None`, or a predicate of a `keras.Variable` that selects the perturbed
            variables. Non-trainable and integer variables are never perturbed. To save
            the model, use a function that is registered with Keras, not a lambda.

    Reference: [Zhao and Zhang, 2022](https://arxiv.org/abs/2201.06064), Section 3.3.

    Example:

    ```python
    class Uphill(keras_nrs.perturbations.Perturbation):
        def sample(self, weights, eps, rng):
            return [eps * keras.ops.sign(w) for w in weights]

    model = keras_nrs.wrap(model, eps=0.05, perturbation=Uphill())
    ```
    """

    # A default for subclasses that do not call `super().__init__()`.
    where: Callable[[Any], bool] | None = None

    def __init__(self, *, where: Callable[[Any], bool] | None = None) -> None:
        if where is not None and not callable(where):
            raise TypeError(
                "`where` must be None or a predicate of a variable. Received: "
                f"where={where!r}. For example: where=lambda v: 'kernel' in v.path"
            )
        self.where = where

    def sample(self, weights: Sequence[Any], eps: Tensor, rng: Any) -> list[Tensor]:
        """Draw one delta.

        Args:
            weights: Float tensors or variables, the perturbed ones.
            eps: Scalar, the size of the neighborhood.
            rng: A source of random tensors, with `rng.normal(shape)`,
                `rng.rademacher(shape)` and `rng.uniform(shape)`. Calls at one step
                return independent numbers, and a repeated step returns the same ones.
                The built-in classes also take an `int` or a
                `keras.random.SeedGenerator`.

        Returns:
            A list of tensors with the shapes of `weights`, in float64 if any weight has
            it, otherwise in float32.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement sample(weights, eps, rng)."
        )

    def selects(self, variable: Any) -> bool:
        """Whether a trainable variable is perturbed."""
        is_float = keras.backend.is_float_dtype(variable.dtype)
        return is_float and (self.where is None or bool(self.where(variable)))

    def get_config(self) -> dict[str, Any]:
        own = type(self)
        has_own_init = own.__init__ is not Perturbation.__init__
        if has_own_init and own.get_config is Perturbation.get_config:
            raise NotImplementedError(
                f"{own.__name__} has its own __init__(), so it must implement "
                "get_config() to be saved: return a dict of the arguments."
            )
        return {"where": self.where}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Perturbation":
        config = dict(config)
        if isinstance(config.get("where"), dict):
            config["where"] = keras.saving.deserialize_keras_object(config["where"])
        return cls(**config)


class _RandomDirection(Perturbation):
    """A perturbation with a random direction and a random radius."""

    default_radius = "uniform"

    def __init__(
        self,
        *,
        radius: str | None = None,
        noise: str = "normal",
        where: Callable[[Any], bool] | None = None,
    ) -> None:
        super().__init__(where=where)
        if radius is None:
            radius = self.default_radius
        self.radius = check_choice("radius", radius, RADII)
        self.noise = check_choice("noise", noise, NOISES)

    def sample(self, weights: Sequence[Any], eps: Tensor, rng: Any) -> list[Tensor]:
        is_list = isinstance(weights, list | tuple)
        if not is_list or not all(hasattr(w, "shape") for w in weights):
            raise TypeError(
                "`weights` must be a list of tensors or variables. Received: weights "
                f"of type {type(weights).__name__}. For example: "
                "weights=model.trainable_variables"
            )
        eps = check_scalar("eps", eps)
        if not weights:
            return []
        weights = [ops.convert_to_tensor(w) for w in weights]
        dtype = _common_dtype(weights)
        weights = [ops.cast(w, dtype) for w in weights]
        eps = ops.convert_to_tensor(eps, dtype)
        return self._draw(weights, eps, random_stream(rng))

    def _draw(
        self, weights: list[Tensor], eps: Tensor, rng: RandomStream
    ) -> list[Tensor]:
        """delta for weights of one dtype."""
        raise NotImplementedError

    def _noise(self, weights: list[Tensor], rng: RandomStream) -> list[Tensor]:
        """Independent noise for every element.

        One flat tensor for all weights, which takes fewer operations, or a tensor for
        each weight.
        """
        draw = rng.normal if self.noise == "normal" else rng.rademacher
        dtype = keras.backend.standardize_dtype(weights[0].dtype)
        size = _num_elements(weights)
        if rng.draws_whole and size < _MAX_DRAW:
            return [draw((size,), dtype)]
        return [draw(tuple(w.shape), dtype) for w in weights]

    def _relative_radius(self, weights: list[Tensor], rng: RandomStream) -> Tensor:
        """The factor u in [0, 1]."""
        if self.radius == "sphere":
            return 1.0
        uniform = rng.uniform((), keras.backend.standardize_dtype(weights[0].dtype))
        if self.radius == "volume":
            return uniform ** (1.0 / max(1, _num_elements(weights)))
        return uniform

    def _in_ball(
        self, weights: list[Tensor], radius: Tensor, rng: RandomStream
    ) -> list[Tensor]:
        """A random point in a ball of the given radius around zero."""
        noise = self._noise(weights, rng)
        factor = _ROUNDING_MARGIN * self._relative_radius(weights, rng)
        scale = radius * factor * _reciprocal(norm(noise))
        return _shaped_like(weights, [scale * g for g in noise])

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"radius": self.radius, "noise": self.noise}


@keras.saving.register_keras_serializable(package="keras_nrs")
class Ball(_RandomDirection):
    """The paper's delta, in the ball B(0, eps) around all perturbed weights together.

    `delta = eps * u * g / norm(g)`, where g is random noise over all perturbed
    weights and u is in [0, 1].

    With the paper's eps = 0.1 this ball is very small: on every network we measured,
    NRS only doubled the loss. Use `RelativeBall`, whose radius grows with the network,
    or find an eps with `keras_nrs.calibrate_eps`.

    Args:
        radius: Distribution of the length of delta. `"volume"`: delta is uniform in
            the ball, `u = U ** (1 / n)` with U uniform in [0, 1] and n the number of
            perturbed weights. `"uniform"`: `u = U`. `"sphere"`: `u = 1`. Defaults to
            `"volume"`.
        noise: Distribution of the elements of g. `"normal"`: standard normal, so the
            direction is uniform on the sphere. On JAX and TensorFlow its elements
            take 1,021 values (`keras_nrs/noise.py`), on PyTorch's CPU 65,536.
            `"rademacher"`: -1 or 1, cheaper.
        where: `None`, or a predicate of a `keras.Variable` that selects the perturbed
            variables.

    Reference: [Zhao and Zhang, 2022](https://arxiv.org/abs/2201.06064), Algorithm 1.

    Example:

    ```python
    model = keras_nrs.wrap(model, eps=5.0, perturbation=Ball(radius="sphere"))
    ```
    """

    default_radius = "volume"

    def _draw(
        self, weights: list[Tensor], eps: Tensor, rng: RandomStream
    ) -> list[Tensor]:
        return self._in_ball(weights, eps, rng)


@keras.saving.register_keras_serializable(package="keras_nrs")
class RelativeBall(_RandomDirection):
    """delta in a ball whose radius is eps times the norm of the weights.

    `delta = eps * norm(theta) * u * g / norm(g)`. eps has no unit, and its values carry
    over between networks. Start with 0.15 to 0.5; above 0.5 training can diverge.

    Args:
        radius: As in `Ball`. Defaults to `"uniform"`.
        noise: As in `Ball`.
        where: As in `Ball`. The norm is over the perturbed weights.

    Example:

    ```python
    model = keras_nrs.wrap(model, eps=0.3, perturbation="relative")
    ```
    """

    def _draw(
        self, weights: list[Tensor], eps: Tensor, rng: RandomStream
    ) -> list[Tensor]:
        return self._in_ball(weights, eps * norm(weights), rng)


@keras.saving.register_keras_serializable(package="keras_nrs")
class LayerwiseBall(_RandomDirection):
    """delta in a ball for each variable, whose radius is eps times its norm.

    `delta_l = eps * norm(theta_l) * u_l * g_l / norm(g_l)` for each variable l. A
    variable that is zero, such as a fresh bias, stays unperturbed. Useful values of
    eps are smaller than those of `RelativeBall`: 0.1 to 0.2.

    Args:
        radius: As in `Ball`. Defaults to `"uniform"`, drawn for each variable.
        noise: As in `Ball`.
        where: As in `Ball`.

    Example:

    ```python
    model = keras_nrs.wrap(model, eps=0.15, perturbation="layerwise")
    ```
    """

    def _draw(
        self, weights: list[Tensor], eps: Tensor, rng: RandomStream
    ) -> list[Tensor]:
        deltas = []
        for weight in weights:
            deltas += self._in_ball([weight], eps * norm([weight]), rng)
        return deltas


@keras.saving.register_keras_serializable(package="keras_nrs")
class ReleasedCode(_RandomDirection):
    """delta as the authors' released code scales it, which differs from the paper.

    `delta = eps * u * g / norm(theta)`. The noise g is divided by the norm of the
    weights, not by its own. With `"normal"` noise `norm(delta)` is about `eps * u *
    sqrt(n) / norm(theta)`, which is tens of times eps for WideResNet-28-10. The paper's
    results were made with this code. Two things differ here: weights of equal shape get
    independent noise, and no gradient flows through the scale.

    Args:
        radius: Distribution of u, as in `Ball`. Defaults to `"uniform"`, as in the
            released code.
        noise: As in `Ball`.
        where: As in `Ball`. The norm is over the perturbed weights.

    Reference: <https://github.com/zhaoyang-0204/nrs>, cited by the paper.

    Example:

    ```python
    model = keras_nrs.wrap(model, eps=0.1, perturbation="released")
    ```
    """

    def _draw(
        self, weights: list[Tensor], eps: Tensor, rng: RandomStream
    ) -> list[Tensor]:
        noise = self._noise(weights, rng)
        factor = self._relative_radius(weights, rng)
        scale = eps * factor * _reciprocal(norm(weights))
        return _shaped_like(weights, [scale * g for g in noise])


_NAMES: dict[str, type[Perturbation]] = {
    "ball": Ball,
    "relative": RelativeBall,
    "layerwise": LayerwiseBall,
    "released": ReleasedCode,
}


def get_perturbation(identifier: str | Perturbation) -> Perturbation:
    """The perturbation of a name, or `identifier` if it is a `Perturbation`."""
    if isinstance(identifier, Perturbation):
        return identifier
    if not isinstance(identifier, str) or identifier not in _NAMES:
        raise ValueError(
            f"`perturbation` must be one of {list(_NAMES)} or an instance, not the "
            "class, of a keras_nrs.perturbations.Perturbation. Received: "
            f"perturbation={identifier!r}."
        )
    return _NAMES[identifier]()


def sample_deltas(
    perturbation: Perturbation,
    variables: Sequence[Any],
    values: Sequence[Tensor],
    eps: Tensor,
    rng: Any,
) -> list[Tensor | None]:
    """One delta for each variable, `None` for a variable that is not perturbed."""
    selected = [
        i
        for i, v in enumerate(variables)
        # float8's scales are statistics of the batch, not weights.
        if not v.overwrite_with_gradient and perturbation.selects(v)
    ]
    deltas: list[Tensor | None] = [None] * len(variables)
    if not variables:
        return deltas
    if not selected:
        paths = [v.path for v in variables]
        raise ValueError(
            "`where` must select at least one trainable variable. Received: "
            f"where={perturbation.where!r}, which selects none of "
            f"{paths if len(paths) < 10 else [*paths[:9], '...']}."
        )
    sampled = perturbation.sample([values[i] for i in selected], eps, rng)
    name = f"{type(perturbation).__name__}.sample()"
    if not isinstance(sampled, list | tuple) or len(sampled) != len(selected):
        count = len(sampled) if isinstance(sampled, list | tuple) else "no list of"
        raise ValueError(
            f"{name} must return a list with one tensor for each weight. Received: "
            f"{count} tensors for {len(selected)} weights."
        )
    for i, delta in zip(selected, sampled, strict=True):
        shape = tuple(getattr(delta, "shape", ("no tensor",)))
        if shape != tuple(values[i].shape):
            raise ValueError(
                f"{name} must return tensors of the weights' shapes. Received: shape "
                f"{shape} for {variables[i].path} of shape {tuple(values[i].shape)}."
            )
        deltas[i] = ops.stop_gradient(ops.convert_to_tensor(delta))
    return deltas


def add_deltas(
    values: Sequence[Tensor], deltas: Sequence[Tensor | None]
) -> list[Tensor]:
    """theta + delta in the dtype of theta, added in float32 or float64."""
    return [
        value if delta is None else _add_delta(value, delta)
        for value, delta in zip(values, deltas, strict=True)
    ]


def _add_delta(value: Tensor, delta: Tensor) -> Tensor:
    dtype = _common_dtype([value, delta])
    return ops.cast(ops.cast(value, dtype) + ops.cast(delta, dtype), value.dtype)
