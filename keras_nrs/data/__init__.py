"""The paper's data, from TensorFlow Datasets through `tf.data`, for every backend.

Needs `pip install "keras-nrs[experiments]"`.
"""

import contextlib

import keras

try:
    import sklearn  # noqa: F401
    import tensorflow as tf
    import tensorflow_datasets  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"keras_nrs.data needs the package {error.name}. Install it with: "
        'pip install "keras-nrs[experiments]"',
        name=error.name,
    ) from error

if keras.config.backend() != "tensorflow":
    # The backend that trains needs the memory of the accelerators. TensorFlow raises an
    # error if the user's program has used them already.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")

from keras_nrs.data.digits import Digits as Digits
from keras_nrs.data.image_data import ImageData as ImageData
