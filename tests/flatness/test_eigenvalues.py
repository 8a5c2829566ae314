import math
from typing import Any

import keras
import numpy as np
import pytest

from keras_nrs.flatness import hessian_density
from keras_nrs.flatness import hessian_eigenvalues
from keras_nrs.flatness import hessian_operator
from keras_nrs.flatness import hessian_trace
from keras_nrs.flatness.operator import HessianOperator
from tests.support import hessians
from tests.support.data import image_data
from tests.support.matrix import rest
from tests.support.networks import cnn
from tests.support.precision import precision

RTOL = {"float32": 1e-4, "float64": 1e-8}


@pytest.mark.parametrize("dtype", ["float64", *rest("float32")])
def test_against_the_dense_hessian(dtype: str) -> None:
    """Eigenvalues, trace and moments of the density, for all 215 weights."""
    with precision(dtype):
        model = hessians.classifier()
        x, y = hessians.data(32)
        dense = hessians.dense_hessian(
            model, x, y, model.trainable_variables, regularizers=True
        ).astype("float64")
        dense = (dense + dense.T) / 2
        options: dict[str, Any] = {"variables": "all", "batch_size": 16}
        exact = np.linalg.eigvalsh(dense)[::-1]
        tol = {"float32": 1e-6, "float64": 1e-12}[dtype]
        scale = RTOL[dtype] * np.abs(exact).max()
        by_magnitude = exact[np.argsort(-np.abs(exact))]
        for which, expected in (
            ("largest", exact[:3]),
            ("smallest", exact[-3:]),
            ("magnitude", np.sort(by_magnitude[:3])[::-1]),
        ):
            result = hessian_eigenvalues(
                model, x, y, k=3, which=which, tol=tol, **options
            )
            assert result.converged
            np.testing.assert_allclose(result.eigenvalues, expected, atol=scale, rtol=0)
            assert np.all(result.residuals < scale)
            assert 12 < result.num_products < 300

        trace = hessian_trace(model, x, y, num_products=215, **options)
        assert trace.value == pytest.approx(np.trace(dense), rel=RTOL[dtype])
        assert trace.standard_error == 0

        # The quadrature is exact, up to rounding, for the random vectors it used.
        density = hessian_density(model, x, y, num_samples=2, num_steps=6, **options)
        rng = np.random.default_rng(0)
        vectors = [rng.choice([-1.0, 1.0], 215) / math.sqrt(215) for _ in range(2)]
        for order in range(12):
            power = np.linalg.matrix_power(dense, order)
            moment, _ = density.moment(order)
            expected_moment = np.mean([v @ power @ v for v in vectors])
            assert moment == pytest.approx(expected_moment, rel=RTOL[dtype])


# PyHessian is for PyTorch.
@pytest.mark.only_torch
@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_against_pyhessian() -> None:
    import torch
    from pyhessian import hessian

    x, y = image_data(48)
    model = cnn(dropout=0.5, seed=0)
    model.fit(x, y, epochs=2, verbose=0)
    data = torch.as_tensor(x), torch.as_tensor(y).long()
    theirs = hessian(model, torch.nn.CrossEntropyLoss(), data=data, cuda=False)
    (expected,), _ = theirs.eigenvalues(maxIter=2000, tol=1e-7)
    result = hessian_eigenvalues(model, x, y, variables="all")
    assert result.eigenvalues[0] == pytest.approx(expected, rel=1e-3)


def test_eigenvectors() -> None:
    model = hessians.classifier()
    x, y = hessians.data(32)
    result = hessian_eigenvalues(model, x, y, k=2, return_eigenvectors=True)
    operator = hessian_operator(model, x, y)
    assert result.eigenvectors is not None
    for value, direction in zip(result.eigenvalues, result.eigenvectors, strict=True):
        assert [d.shape for d in direction] == [
            tuple(v.shape) for v in model.trainable_variables
        ]
        vector = np.concatenate([d.ravel() for d in direction[-2:]])
        assert np.linalg.norm(vector) == pytest.approx(1)
        error = operator @ vector - value * vector
        assert np.linalg.norm(error) < 1e-3 * result.eigenvalues[0]
    without = hessian_eigenvalues(model, x, y)
    assert without.eigenvectors is None


@pytest.mark.matrix
def test_all_eigenvalues_and_a_single_weight() -> None:
    x, y = hessians.data(16)
    model = hessians.classifier()
    exact = np.linalg.eigvalsh(hessian_operator(model, x, y).to_dense())[::-1]
    result = hessian_eigenvalues(model, x, y, k=27)
    np.testing.assert_allclose(result.eigenvalues, exact, atol=1e-5 * exact[0])
    one = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    one.compile(loss="mse")
    x = np.array([[1.0], [3.0]], "float32")
    assert hessian_eigenvalues(one, x, x).eigenvalues == pytest.approx([10.0])
    assert hessian_density(one, x, x).nodes == pytest.approx(10 * np.ones((4, 1)))


@pytest.mark.matrix
def test_no_convergence() -> None:
    x, y = hessians.data(16)
    model = hessians.classifier()
    with pytest.warns(UserWarning, match="did not converge to tol=1e-12 in 3 products"):
        result = hessian_eigenvalues(
            model, x, y, k=9, variables="all", tol=1e-12, max_products=3
        )
    assert not result.converged
    assert len(result.eigenvalues) == len(result.residuals) == 9
    assert np.isnan(result.eigenvalues[-1])


def _is_small(variable: Any) -> bool:
    return variable.shape[-1] < 12 and len(variable.shape) == 1


@pytest.mark.parametrize("variables", ["all", *rest(_is_small)])
def test_products_that_change_are_no_convergence(
    variables: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Lanczos and by the dense solver: the last product is 1 % larger."""
    x, y = hessians.data(16)
    model = hessians.classifier()
    exact = hessian_eigenvalues(model, x, y, variables=variables)
    assert exact.converged
    products = HessianOperator._products

    def changing(self: Any, vectors: Any) -> Any:
        factor = 1.01 if self.num_products >= exact.num_products - 1 else 1.0
        return factor * products(self, vectors)

    monkeypatch.setattr(HessianOperator, "_products", changing)
    with pytest.warns(UserWarning, match="1 of 1 eigenvalues have residuals above"):
        result = hessian_eigenvalues(model, x, y, variables=variables)
    assert not result.converged
    np.testing.assert_array_equal(result.eigenvalues, exact.eigenvalues)
    assert result.residuals == pytest.approx(0.01 * exact.eigenvalues, rel=0.05)


@pytest.mark.parametrize("variables", ["all", *rest("last_layer")])
def test_a_hessian_of_zeros_and_one_that_is_not_finite(variables: str) -> None:
    x, y = hessians.data(16)
    model = hessians.classifier(loss=lambda y, z: keras.ops.mean(0 * z, axis=-1))
    result = hessian_eigenvalues(model, x, y, k=2, variables=variables)
    np.testing.assert_array_equal(result.eigenvalues, [0, 0])
    assert result.converged
    model = hessians.classifier()
    model.set_weights([np.nan * w for w in model.get_weights()])
    with pytest.warns(UserWarning, match="did not converge"):
        result = hessian_eigenvalues(model, x, y, k=2, variables=variables)
    assert np.isnan(result.eigenvalues).all()
    with pytest.raises(ValueError, match="`model` must have a finite Hessian"):
        hessian_density(model, x, y, variables=variables)


@pytest.mark.matrix
def test_a_stopped_measurement_goes_on(tmp_path: Any, monkeypatch: Any) -> None:
    """Ctrl-C, and the same call again."""
    # Not a power of 2, so that means are rounded.
    x, y = hessians.data(30)
    model = hessians.classifier()
    options = {"variables": "all", "checkpoint": tmp_path / "products"}
    expected = hessian_eigenvalues(model, x, y, variables="all")
    products = HessianOperator._products
    count = 0

    def interrupted(self: Any, vectors: Any) -> Any:
        nonlocal count
        count += 1
        if count > 10:
            raise KeyboardInterrupt
        return products(self, vectors)

    monkeypatch.setattr(HessianOperator, "_products", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hessian_eigenvalues(model, x, y, **options)
    monkeypatch.undo()
    result = hessian_eigenvalues(model, x, y, **options)
    np.testing.assert_array_equal(result.eigenvalues, expected.eigenvalues)
    assert result.num_products == expected.num_products - 10 + 1


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (hessian_eigenvalues, {"k": 0}, "`k` must be an integer >= 1"),
        (hessian_eigenvalues, {"k": 28}, "`k` must be at most the number of selected"),
        (hessian_eigenvalues, {"which": "LM"}, "`which` must be one of"),
        (hessian_eigenvalues, {"tol": 0.0}, "`tol` must be > 0"),
        (hessian_eigenvalues, {"max_products": 0}, "`max_products` must be"),
        (hessian_trace, {"method": "exact"}, "`method` must be one of"),
        (hessian_trace, {"num_products": 5}, "`num_products` must be an integer >= 6"),
        (hessian_density, {"num_steps": 1}, "`num_steps` must be an integer >= 2"),
        (hessian_density, {"num_samples": 0}, "`num_samples` must be an integer >= 1"),
        (hessian_density, {"seed": -1}, "`seed` must be an integer from 0"),
    ],
)
def test_bad_arguments(function: Any, options: dict[str, Any], message: str) -> None:
    x, y = hessians.data(8)
    with pytest.raises(ValueError, match=message):
        function(hessians.classifier(), x, y, **options)
