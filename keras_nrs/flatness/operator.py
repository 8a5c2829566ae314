"""Hessian-vector products over a data set, as a SciPy operator."""

import os
from typing import Any
from typing import TypedDict
from typing import Unpack

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from keras_nrs import stateless
from keras_nrs._checks import check_bool
from keras_nrs._checks import check_choice
from keras_nrs._signatures import with_options_of
from keras_nrs.backend import compile_function
from keras_nrs.backend import gradient
from keras_nrs.backend import hessian_at
from keras_nrs.backend import restored_random_state
from keras_nrs.batches import Batch
from keras_nrs.batches import Batches
from keras_nrs.flatness.loss import BatchDivergence
from keras_nrs.flatness.loss import BatchLoss
from keras_nrs.flatness.loss import Inputs
from keras_nrs.flatness.loss import base_model
from keras_nrs.flatness.loss import divergence_in_use
from keras_nrs.flatness.product_log import ProductLog
from keras_nrs.flatness.variables import Selection
from keras_nrs.flatness.variables import select

try:
    from scipy.sparse.linalg import LinearOperator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"keras_nrs.flatness needs the package {error.name}. Install it with: "
        'pip install "keras-nrs[flatness]"',
        name=error.name,
    ) from error

Array = NDArray[Any]
Tensor = Any

CURVATURES = ("hessian", "fisher")


class OperatorOptions(TypedDict, total=False):
    """The keyword arguments of `hessian_operator`, which other measurements pass on."""

    variables: Selection
    curvature: str
    regularizers: bool
    sample_weight: Any
    batch_size: int
    steps: int | None
    checkpoint: str | os.PathLike[str] | None


class HessianOperator(LinearOperator):  # type: ignore[misc]
    """The Hessian of a model's loss over a data set as a `LinearOperator` of SciPy.

    Made by `hessian_operator`, which describes the arguments. Vectors are in float64.
    Products are computed in the dtype of the weights, at the weights of the time when
    the operator was made.

    Attributes:
        model: The model, unwrapped.
        variables: The selected variables of the model. A vector holds their elements,
            each variable raveled, in this order.
        num_products: Number of products computed so far. Each takes two gradients over
            the data set.
    """

    def __init__(
        self,
        batches: Batches,
        loss: BatchLoss,
        compiled: Any,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        self.model = loss.model
        self.variables = loss.variables
        self.num_products = 0
        self._batches = batches
        self._loss = loss
        # Copies, because training overwrites or donates these tensors.
        weights, state = stateless.current_values(self.model)
        self._values = list(map(ops.copy, weights)), list(map(ops.copy, state))
        self._weights = loss.selected(self._values[0])
        self._hessian_at = compiled
        self._product: Any = None
        size = sum(int(np.prod(v.shape)) for v in self.variables)
        super().__init__(np.dtype("float64"), (size, size))
        self._log = None
        if checkpoint is not None:
            self._log = ProductLog(checkpoint, size, self.precision)

    @property
    def precision(self) -> str:
        """The dtype in which products are computed."""
        dtypes = {keras.backend.standardize_dtype(v.dtype) for v in self.variables}
        return "float64" if dtypes == {"float64"} else "float32"

    def split(self, vector: Array) -> list[Array]:
        """A vector as arrays in the shapes of `variables`."""
        vector = np.asarray(vector)
        if vector.shape != self.shape[:1]:
            raise ValueError(
                f"`vector` must have the shape {self.shape[:1]}, one element for each "
                f"selected weight. Received: a vector of shape {vector.shape}."
            )
        ends = np.cumsum([int(np.prod(v.shape)) for v in self.variables])
        parts = np.split(vector, ends[:-1])
        return [p.reshape(v.shape) for p, v in zip(parts, self.variables, strict=True)]

    def as_direction(self, vector: Array) -> list[Array]:
        """A vector as an array for each trainable variable, 0 where not selected."""
        selected = zip(self.variables, self.split(vector), strict=True)
        parts = {id(v): part for v, part in selected}
        return [
            parts.get(id(v), np.zeros(v.shape)) for v in self.model.trainable_variables
        ]

    def to_dense(self) -> Array:
        """The matrix, symmetric, of shape `(n, n)`. Takes n products."""
        matrix = self.matmat(np.eye(self.shape[0]))
        return (matrix + matrix.T) / 2

    def _matvec(self, vector: Array) -> Array:
        return self._matmat(np.reshape(vector, (-1, 1)))[:, 0]

    def _matmat(self, vectors: Array) -> Array:
        vectors = np.asarray(vectors, "float64")
        if self._log is None:
            return self._products(vectors)
        log = self._log
        products = [
            log.product(vector, lambda v: self._products(v[:, None])[:, 0])
            for vector in vectors.T
        ]
        return np.stack(products, axis=1)

    def _adjoint(self) -> "HessianOperator":
        return self

    def _products(self, vectors: Array) -> Array:
        """Products with the columns, in one pass over the data."""
        # Each pass makes the same draws, should the model make any.
        with restored_random_state(self._weights[0]):
            return self._products_in_pass(vectors)

    def _products_in_pass(self, vectors: Array) -> Array:
        columns = [self._as_tensors(column) for column in vectors.T]
        totals: list[list[Tensor]] = []
        num_samples = 0
        for batch in self._batches:
            products = self._products_of_batch(batch, columns)
            n = batch.num_samples
            num_samples += n
            scaled = [[n * part for part in product] for product in products]
            totals = [
                [ops.add(*pair) for pair in zip(total, product, strict=True)]
                for total, product in zip(totals, scaled, strict=False)
            ] or scaled
        self.num_products += len(columns)
        flat = [
            np.concatenate([ops.convert_to_numpy(part).ravel() for part in total])
            for total in totals
        ]
        means = np.stack(flat, axis=1) / num_samples
        # Rounded as a checkpoint rounds, so that results do not depend on having one.
        return means.astype(self.precision).astype("float64")

    def _as_tensors(self, vector: Array) -> list[Tensor]:
        return [
            ops.convert_to_tensor(np.asarray(part, order="C"), v.dtype)
            for part, v in zip(self.split(vector), self.variables, strict=True)
        ]

    def _products_of_batch(
        self, batch: Batch, columns: list[list[Tensor]]
    ) -> list[list[Tensor]]:
        """Products with the Hessian of the loss of one batch."""
        inputs = Inputs(batch, *self._values)
        try:
            product = self._product
            if product is None:
                product = self._hessian_at(self._weights, inputs)
            if self._batches.is_single:
                self._product = product
            return [product(column) for column in columns]
        except Exception as error:
            if self.num_products:
                raise
            self._check_gradient(inputs)
            raise NotImplementedError(
                f"The model named {self.model.name!r} cannot be differentiated twice: "
                f"{keras.config.backend()} has a first derivative of its loss, but no "
                "second one. The usual causes are recurrent layers on a GPU, for which "
                "use_cudnn=False helps, and operations with a custom gradient. Select "
                "weights of other layers with `variables`, or replace the layers. The "
                f"error was: {error}"
            ) from error

    def _check_gradient(self, inputs: Inputs) -> None:
        """Raise the error of the first derivative, if that fails too."""
        compile_function(
            lambda weights, inputs: gradient(lambda w: self._loss(w, inputs), weights)
        )(self._weights, inputs)


def hessian_operator(
    model: keras.Model,
    x: Any,
    y: Any = None,
    **options: Unpack[OperatorOptions],
) -> HessianOperator:
    """The Hessian of the compiled loss over a data set, for SciPy.

    The loss is the one that `model.evaluate()` reports: in inference mode (no dropout,
    BatchNorm with its moving statistics), the mean over batches weighted by their
    numbers of samples. Layers compute in the dtype of their weights, even in mixed
    precision. The batch size, not the data set, bounds the memory that a product takes.

    Args:
        model: A built model, compiled with a loss, wrapped or not.
        x: Inputs: an array of shape `(num_samples, ...)` or a list or dict of them, or
            batches `(x, y)` or `(x, y, sample_weight)` from a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a `DataLoader` of PyTorch or a generator. Each
            pass must yield the same samples, in any order. The batches of a generator
            are kept in memory, and those of any data set with `steps`.
        y: Labels, if `x` is arrays.
        variables: The weights in which to differentiate. `"last_layer"`: the weights
            of the last layer with weights, for each output, or those that a subclassed
            model itself uses there. `"all"`: all trainable weights. A layer, a
            variable, the name or path of a layer, the path of a variable, or a
            regular expression (an `re.Pattern`: `re.compile("kernel")`) to search in
            the paths of variables; or a list of such items. Or a predicate of a
            `keras.Variable`. Defaults to `"last_layer"`.
        curvature: `"hessian"`, or `"fisher"`: the Fisher information of the outputs,
            which is the Hessian of the model divergence d(theta, theta') at theta' =
            theta. For cross-entropies of logits it is the generalized Gauss-Newton
            matrix. It has no negative eigenvalues, and labels do not matter for it.
            Defaults to `"hessian"`.
        regularizers: Whether the losses of layers (weight penalties, `add_loss`) count
            in the Hessian. Defaults to True.
        sample_weight: Weights of the samples, if `x` is arrays.
        batch_size: Samples in a batch, if `x` is arrays. Defaults to 32.
        steps: Number of batches to use. Defaults to all.
        checkpoint: Path of a file that keeps each product, so that the same
            measurement, started again, goes on where it stopped. The file takes 4 bytes
            for each weight and product. Defaults to no file.

    Returns:
        A `HessianOperator`, symmetric, of shape `(n, n)` for n selected weights, in
        the unit of the loss per squared weight.

    Raises:
        TypeError, ValueError: if an argument is not as described. At a later product,
            if the samples are not those of the first pass.
        NotImplementedError: at the first product, if the model cannot be
            differentiated twice.

    Reference: [Pearlmutter, 1994](https://doi.org/10.1162/neco.1994.6.1.147).

    Example:

    >>> import keras, keras_nrs, numpy as np
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x = np.array([[1.0, 0.0], [0.0, 2.0]], "float32")
    >>> y = np.zeros((2, 1), "float32")
    >>> operator = keras_nrs.flatness.hessian_operator(model, x, y)
    >>> operator.to_dense()
    array([[1., 0., 1.],
           [0., 4., 2.],
           [1., 2., 2.]])
    """
    return _make_operator(model, x, y, **options)


def _make_operator(  # noqa: PLR0913
    model: keras.Model,
    x: Any,
    y: Any,
    *,
    variables: Selection = "last_layer",
    curvature: str = "hessian",
    regularizers: bool = True,
    sample_weight: Any = None,
    batch_size: int = 32,
    steps: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> HessianOperator:
    check_choice("curvature", curvature, CURVATURES)
    check_bool("regularizers", regularizers)
    divergence = divergence_in_use(model)
    model = base_model(model)
    batches = Batches(model, x, y, sample_weight, batch_size=batch_size, steps=steps)
    selected = select(model, variables, batches)

    def make_loss() -> tuple[BatchLoss, Any]:
        first_batch = next(iter(batches))
        loss: BatchLoss
        if curvature == "fisher":
            loss = BatchDivergence(
                model, selected, first_batch=first_batch, divergence=divergence
            )
        else:
            loss = BatchLoss(
                model, selected, regularizers=regularizers, first_batch=first_batch
            )
        return loss, hessian_at(loss)

    key = curvature, regularizers, str(divergence), *(id(v) for v in selected)
    loss, compiled = stateless.cached_on_model(model, key, make_loss)
    return HessianOperator(batches, loss, compiled, checkpoint=checkpoint)


with_options_of(_make_operator)(hessian_operator)
