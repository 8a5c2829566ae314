"""Numbers of another precision than float32."""

import contextlib
from collections.abc import Iterator

import keras


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """A context in which Keras makes models and losses of this dtype."""
    with contextlib.ExitStack() as stack:
        if keras.config.backend() == "jax" and dtype == "float64":
            import jax

            stack.enter_context(jax.enable_x64(True))
        before = keras.config.floatx()
        keras.config.set_floatx(dtype)
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy(dtype)
        stack.callback(keras.config.set_dtype_policy, policy)
        stack.callback(keras.config.set_floatx, before)
        yield
