"""The only code that imports a framework; each file defines the same names."""

import keras

if keras.config.backend() == "jax":
    from keras_nrs.backend.jax import BackendTrainer
    from keras_nrs.backend.jax import RandomStream
    from keras_nrs.backend.jax import compile_function
elif keras.config.backend() == "tensorflow":
    from keras_nrs.backend.tensorflow import BackendTrainer
    from keras_nrs.backend.tensorflow import RandomStream
    from keras_nrs.backend.tensorflow import compile_function
elif keras.config.backend() == "torch":
    from keras_nrs.backend.torch import BackendTrainer
    from keras_nrs.backend.torch import RandomStream
    from keras_nrs.backend.torch import compile_function
else:
    raise ImportError(
        "keras_nrs trains on the backends 'jax', 'tensorflow' and 'torch'. Received: "
        f"keras.config.backend()={keras.config.backend()!r}. Set the environment "
        "variable KERAS_BACKEND to one of the three before importing keras."
    )

__all__ = ["BackendTrainer", "RandomStream", "compile_function"]
