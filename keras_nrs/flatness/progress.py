"""Progress of long measurements on the terminal."""

import sys

import keras

from keras_nrs._checks import check_int


class Progress:
    """A line that counts finished units and estimates the remaining time.

    Where nobody watches, in a file or a pipe, it is written once, at the end.

    Args:
        verbose: 0 for silence, or 1.
        total: Number of units, `None` if it is not known beforehand.
        unit: Name of a unit.
    """

    def __init__(self, verbose: int, total: int | None, unit: str) -> None:
        check_int("verbose", verbose, minimum=0, maximum=1)
        self._bar = keras.utils.Progbar(total, unit_name=unit) if verbose else None
        self._done = 0
        # Keras draws its bar anew on all of POSIX.
        self._is_watched = sys.stdout.isatty() or "ipykernel" in sys.modules

    def advance(self, by: int = 1) -> None:
        """Count finished units."""
        self._done += by
        if self._bar is not None and self._is_watched:
            self._bar.update(self._done, finalize=False)

    def finish(self) -> None:
        """End the line."""
        if self._bar is not None:
            self._bar.update(self._done, finalize=True)
