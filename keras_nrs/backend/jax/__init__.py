from keras_nrs.backend.jax.devices import data_parallel_scope as data_parallel_scope
from keras_nrs.backend.jax.functions import compile_function as compile_function
from keras_nrs.backend.jax.functions import gradient as gradient
from keras_nrs.backend.jax.functions import hessian_at as hessian_at
from keras_nrs.backend.jax.random import RandomStream as RandomStream
