"""A file of the products of a long measurement, so that it can go on after a stop."""

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

    A record is the digest of a vector, and the product. A measurement that starts
    again asks for the same vectors in the same order, and gets products from the file
    until a vector differs. New records overwrite all after the last one that was used,
    or that a kill cut off.

    Args:
        path: Path of the file.
        size: Number of elements of a vector.
        dtype: The dtype in which products are computed.

    Raises:
        ValueError: if the file is not a log of vectors of this size and dtype.
    """

    def __init__(self, path: str | os.PathLike[str], size: int, dtype: str) -> None:
        self.path = Path(path)
        self._dtype = np.dtype(dtype)
        self._header = _MAGIC + f"{size} {dtype}\n".encode()
        self._record_size = hashlib.sha256().digest_size + size * self._dtype.itemsize
        self._next = 0
        self._num_records = 0
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
                f"wrote. Received: checkpoint={os.fspath(path)!r}, which is another "
                "file. Choose another name."
            )
        total_size = self.path.stat().st_size - len(self._header)
        self._num_records = total_size // self._record_size

    def product(self, vector: Array, compute: Callable[[Array], Array]) -> Array:
        """The product with a vector, from the file or computed and appended to it."""
        digest = hashlib.sha256(vector.tobytes()).digest()
        if self._next < self._num_records:
            logged, product = self._read_record(self._next)
            if logged == digest:
                if not self._is_checked:
                    self._check_product(product, compute(vector))
                self._next += 1
                return product
            # The measurement asks for other vectors from here on.
            self._num_records = self._next
        # Rounded as in the file, so that later vectors are the same to the last bit.
        product = compute(vector).astype(self._dtype)
        self._append_record(digest + product.tobytes())
        return product.astype("float64")

    def _check_product(self, logged: Array, computed: Array) -> None:
        """Raise an error if another model, data set or setting wrote the file."""
        error = np.linalg.norm(logged - computed)
        if not error <= 1e-3 * np.linalg.norm(computed):
            raise ValueError(
                "`checkpoint` must be of the same model, data and settings. Received: "
                f"checkpoint={os.fspath(self.path)!r}, whose first product differs. "
                "Delete the file, or choose another name."
            )
        self._is_checked = True

    def _read_record(self, index: int) -> tuple[bytes, Array]:
        with self.path.open("rb") as file:
            file.seek(len(self._header) + index * self._record_size)
            record = file.read(self._record_size)
        size = hashlib.sha256().digest_size
        return record[:size], np.frombuffer(record[size:], self._dtype).astype(float)

    def _append_record(self, record: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(len(self._header) + self._num_records * self._record_size)
            file.write(record)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self._num_records += 1
        self._next = self._num_records
