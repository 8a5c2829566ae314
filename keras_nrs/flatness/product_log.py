"""Products of a long measurement in a file, so that it can go on after a stop."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_MAGIC = b"keras_nrs products 1\n"


class ProductLog:
    """The products of an operator with the vectors of one deterministic measurement.

    Each record is a digest of the vector and the product. A measurement that starts
    again asks for the same vectors in the same order, and gets the products from the
    file until it comes to a vector that is not in it. Records are only ever appended;
    one that was cut off is overwritten.

    Args:
        path: Of the file.
        size: Number of elements of a vector.
        dtype: In which products were computed.

    Raises:
        ValueError: if the file is of something else.
    """

    def __init__(self, path: str | os.PathLike[str], size: int, dtype: str) -> None:
        self.path = Path(path)
        self._dtype = np.dtype(dtype)
        self._header = _MAGIC + f"{size} {dtype}\n".encode()
        self._record = hashlib.sha256().digest_size + size * self._dtype.itemsize
        self._next = 0
        self._length = 0
        self._is_checked = False
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(self._header)
            return
        with self.path.open("rb") as file:
            header = file.read(len(self._header))
        if header != self._header:
            raise ValueError(
                "`checkpoint` must be a new file, or one that the same measurement "
                f"wrote. Received: checkpoint={os.fspath(path)!r}, which is of "
                "something else. Choose another name."
            )
        size_of_records = self.path.stat().st_size - len(self._header)
        self._length = size_of_records // self._record

    def product(self, vector: Array, compute: Callable[[Array], Array]) -> Array:
        """The product with a vector, from the file or else computed and appended."""
        digest = hashlib.sha256(vector.tobytes()).digest()
        if self._next < self._length:
            known, product = self._read(self._next)
            if known == digest:
                if not self._is_checked:
                    self._check(product, compute(vector))
                self._next += 1
                return product
            # The measurement took another way from here on.
            self._length = self._next
        # As it will be read: what comes after it must be the same, to the last bit.
        product = compute(vector).astype(self._dtype)
        self._append(digest + product.tobytes())
        return product.astype("float64")

    def _check(self, known: Array, computed: Array) -> None:
        """Raise an error if the file is of another model, data or setting."""
        error = np.linalg.norm(known - computed)
        if not error <= 1e-3 * np.linalg.norm(computed):
            raise ValueError(
                "`checkpoint` must be of the same model, data and settings. Received: "
                f"checkpoint={os.fspath(self.path)!r}, whose first product differs. "
                "Delete the file, or choose another name."
            )
        self._is_checked = True

    def _read(self, index: int) -> tuple[bytes, Array]:
        with self.path.open("rb") as file:
            file.seek(len(self._header) + index * self._record)
            record = file.read(self._record)
        size = hashlib.sha256().digest_size
        return record[:size], np.frombuffer(record[size:], self._dtype).astype(float)

    def _append(self, record: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(len(self._header) + self._length * self._record)
            file.write(record)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self._length += 1
        self._next = self._length
