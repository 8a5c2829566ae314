"""The tests of Keras that pass with plain models and not with wrapped ones."""

# For each reason the patterns of tests, on all backends or on one.
DIFFERENCES: dict[str, dict[str, tuple[str, ...]]] = {
    "callbacks get the wrapped model's own logs as well": {
        "all": (
            "callbacks/csv_logger_test.py::*::test_CSVLogger",
            "callbacks/remote_monitor_test.py::*::test_RemoteMonitorWithJsonPayload",
            "callbacks/tensorboard_test.py::*::test_TensorBoard_across_invocations",
            "callbacks/tensorboard_test.py::*::test_TensorBoard_basic",
            "callbacks/tensorboard_test.py::*::test_TensorBoard_batch_metrics",
            "callbacks/tensorboard_test.py::*::test_TensorBoard_global_step",
            "callbacks/tensorboard_test.py::*::test_TensorBoard_learning_rate_*",
            "callbacks/tensorboard_test.py::*::test_TensorBoard_weight_*",
            "callbacks/tensorboard_test.py::*::test_custom_summary",
            "trainers/trainer_test.py::*::test_callback_methods_keys",
        ),
    },
    "a checkpoint of the wrapped model is loaded into the base model": {
        "all": (
            "callbacks/model_checkpoint_test.py::*::test_model_checkpoint_loading",
        ),
    },
    "a private attribute is read of the backup that fit() replaces by an atomic one": {
        "all": (
            "callbacks/backup_and_restore_test.py::*::test_backup_corrupted",
            "callbacks/backup_and_restore_test.py::*::test_best_case_*",
        ),
    },
    "eagerly, TensorFlow makes the gradient through theta + delta dense": {
        "tensorflow": ("trainers/trainer_test.py::*::test_fit_sparse_*_eager",),
    },
    # By a private function, which leaves the package's compiled noise in the old one.
    "an earlier test of the same process replaces TensorFlow's context": {
        "tensorflow": ("callbacks/terminate_on_nan_test.py::*::test_TerminateOnNaN",),
    },
    "divergences take no ragged outputs, and say so": {
        "tensorflow": ("layers/core/embedding_test.py::*::test_ragged",),
    },
}
