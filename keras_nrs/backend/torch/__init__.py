from keras_nrs.backend.torch.devices import data_parallel_scope as data_parallel_scope
from keras_nrs.backend.torch.devices import fit_scope as fit_scope
from keras_nrs.backend.torch.devices import join_processes as join_processes
from keras_nrs.backend.torch.devices import loop_over_batches as loop_over_batches
from keras_nrs.backend.torch.devices import process_index as process_index
from keras_nrs.backend.torch.devices import processes as processes
from keras_nrs.backend.torch.devices import scope_of as scope_of
from keras_nrs.backend.torch.devices import shares_of_workers as shares_of_workers
from keras_nrs.backend.torch.devices import values_of_processes as values_of_processes
from keras_nrs.backend.torch.functions import compile_function as compile_function
from keras_nrs.backend.torch.functions import eager_scope as eager_scope
from keras_nrs.backend.torch.functions import gradient as gradient
from keras_nrs.backend.torch.functions import gradient_with as gradient_with
from keras_nrs.backend.torch.functions import hessian_at as hessian_at
from keras_nrs.backend.torch.functions import not_in_graphs as not_in_graphs
from keras_nrs.backend.torch.functions import reshape as reshape
from keras_nrs.backend.torch.functions import sum_of_squares as sum_of_squares
from keras_nrs.backend.torch.functions import sums_of_squares as sums_of_squares
from keras_nrs.backend.torch.functions import take_rows as take_rows
from keras_nrs.backend.torch.random import RandomStream as RandomStream
from keras_nrs.backend.torch.random import random_state as random_state
from keras_nrs.backend.torch.random import (
    restored_random_state as restored_random_state,
)
from keras_nrs.backend.torch.random import set_random_state as set_random_state
from keras_nrs.backend.torch.random import unrepeatable_draws as unrepeatable_draws
