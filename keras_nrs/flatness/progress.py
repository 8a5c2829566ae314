"""Progress of long measurements on the terminal."""

from typing import Any

import keras

from keras_nrs._checks import check_int


class Progress:
    """A line that counts what is done and says how long the rest will take.

    Args:
        verbose: 0 for silence, or 1.
        total: How many there are, or `None` if that is not known beforehand.
        unit: What is counted.
    """

    def __init__(self, verbose: int, total: int | None, unit: str) -> None:
        check_int("verbose", verbose, minimum=0, maximum=1)
        self._bar = keras.utils.Progbar(total, unit_name=unit) if verbose else None
        self._done = 0

    def advance(self, by: int = 1, **values: Any) -> None:
        """Count some more, and show values beside it."""
        self._done += by
        if self._bar is not None:
            self._bar.update(self._done, list(values.items()), finalize=False)

    def finish(self) -> None:
        """End the line."""
        if self._bar is not None:
            self._bar.update(self._done, finalize=True)
