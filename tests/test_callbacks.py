import warnings
from typing import Any

import keras
import pytest

import keras_nrs
from tests import models


def fit(**kwargs: Any) -> Any:
    x, y = models.image_data()
    nrs = keras_nrs.wrap(models.cnn(), seed=0, **kwargs)
    nrs.fit(x, y, batch_size=16, epochs=2, verbose=0)
    return nrs


def test_inert_eps_is_reported_once() -> None:
    """The warning names eps, the divergence, the norm and what to do."""
    x, y = models.image_data()
    with pytest.warns(UserWarning) as record:
        nrs = fit(eps=1e-3)
        nrs.fit(x, y, verbose=0)
    (warning,) = (w for w in record if w.category is UserWarning)
    text = str(warning.message)
    for part in ("eps=0.001", "Ball", "divergence was", "norm of the weights is"):
        assert part in text
    for advice in ("perturbation='relative'", "calibrate_eps"):
        assert advice in text


@pytest.mark.parametrize(
    "arguments",
    [
        {"eps": 0.0},
        {"eps": 1e-3, "alpha": 0.0},
        {"eps": 1e-3, "scheme": "rpr"},
        {"eps": 1e-3, "scheme": "baseline"},
        {"eps": 0.3, "perturbation": "relative"},
    ],
    ids=str,
)
def test_no_warning(arguments: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(**arguments)


def test_no_warning_for_a_scheduled_eps() -> None:
    class WarmUp(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.model.eps = 1e-3 * (1 + epoch)

    x, y = models.image_data()
    nrs = keras_nrs.wrap(models.cnn(), eps=0.5)
    nrs.fit(x, y, epochs=2, verbose=0, callbacks=WarmUp())


def test_model_that_builds_itself_in_fit() -> None:
    model = models.Subclassed()
    models.compile_classifier(model)
    x, y = models.image_data()
    with pytest.warns(UserWarning, match="no effect"):
        keras_nrs.wrap(model, eps=1e-3).fit(x, y, batch_size=16, verbose=0)


def test_alpha_is_named_where_alpha_is_at_fault() -> None:
    with pytest.warns(UserWarning, match="alpha=1e-06 is too small"):
        fit(eps=2.0, alpha=1e-6)


def test_added_to_the_users_callback_list() -> None:
    x, y = models.image_data()
    nrs = keras_nrs.wrap(models.cnn(), eps=1e-3)
    callbacks = keras.callbacks.CallbackList(model=nrs, add_history=True, epochs=1)
    with pytest.warns(UserWarning, match="no effect"):
        nrs.fit(x, y, batch_size=16, verbose=0, callbacks=callbacks)
