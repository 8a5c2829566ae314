"""Numbers of another precision than float32."""

import contextlib
from collections.abc import Iterator

import keras


def jax_float64() -> contextlib.AbstractContextManager[None]:
    """A context in which JAX has numbers of 64 bits."""
    import jax
    import jax.experimental

    # JAX 0.7 has it among its experiments.
    home = jax if hasattr(jax, "enable_x64") else jax.experimental
    enabled: contextlib.AbstractContextManager[None] = home.enable_x64(True)
    return enabled


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """A context in which Keras makes models and losses of this dtype."""
    with contextlib.ExitStack() as stack:
        if keras.config.backend() == "jax" and dtype == "float64":
            stack.enter_context(jax_float64())
        before = keras.config.floatx()
        keras.config.set_floatx(dtype)
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy(dtype)
        stack.callback(keras.config.set_dtype_policy, policy)
        stack.callback(keras.config.set_floatx, before)
        yield
