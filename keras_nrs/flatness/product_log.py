"""A file of the products of a long measurement, so that it can go on after a stop."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_MAGIC = b"keras_nrs products 2\n"
_CHECKSUM_SIZE = 16


class ProductLog:
    """The products of an operator with the vectors of one deterministic measurement.

    A record is the digest of a vector, the product, and a checksum of both. A
    measurement that starts again asks for the same vectors in the same order, and gets
    products from the file until a vector differs. New records overwrite all after the
    last one that was used, or that a kill cut off. A damaged record is written again.

    Args:
        path: Path of the file.
        size: Number of elements of a vector.
        dtype: The dtype in which products are computed.

    Raises:
        ValueError: if the file is not a log of vectors of this size and dtype.
    """

    def __init__(self, path: str | os.PathLike[str], size: int, dtype: str) -> None:
        self.path = Path(path)
        self._number = np.dtype(dtype)
        self._header = _MAGIC + f"{size} {dtype}\n".encode()
        digest_size = hashlib.sha256().digest_size
        content_size = digest_size + size * self._number.itemsize
        self._record_size = content_size + _CHECKSUM_SIZE
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
                "file, damaged, or of version 0.1.0. Delete it, or choose another name."
            )
        total_size = self.path.stat().st_size - len(self._header)
        self._num_records = total_size // self._record_size

    def product(self, vector: Array, compute: Callable[[Array], Array]) -> Array:
        """The product with a vector, from the file or computed and appended to it."""
        digest = hashlib.sha256(vector.tobytes()).digest()
        if self._next < self._num_records:
            record = self._read_record(self._next)
            if record is not None and record[0] == digest:
                product = record[1]
                if not self._is_checked:
                    self._check_product(product, compute(vector))
                self._next += 1
                return product
            if record is not None:
                # The measurement asks for other vectors from here on.
                self._num_records = self._next
        # Rounded as in the file, so that later vectors are the same to the last bit.
        product = compute(vector).astype(self._number)
        self._write_record(self._next, digest + product.tobytes())
        self._next += 1
        return product.astype("float64")

    def _check_product(self, logged: Array, computed: Array) -> None:
        """Raise an error if another model, data set or setting wrote the file."""
        error = np.linalg.norm(logged - computed)
        # Of a model that has diverged, products are NaN.
        is_same = error <= 1e-3 * np.linalg.norm(computed) or np.array_equal(
            logged, computed, equal_nan=True
        )
        if not is_same:
            raise ValueError(
                "`checkpoint` must be of the same model, data and settings. Received: "
                f"checkpoint={os.fspath(self.path)!r}, whose first product differs. "
                "Delete the file, or choose another name."
            )
        self._is_checked = True

    def _read_record(self, index: int) -> tuple[bytes, Array] | None:
        """The digest of a vector, and the product; `None` if the checksum is wrong."""
        with self.path.open("rb") as file:
            file.seek(len(self._header) + index * self._record_size)
            record = file.read(self._record_size)
        content, checksum = record[:-_CHECKSUM_SIZE], record[-_CHECKSUM_SIZE:]
        if _checksum(content) != checksum:
            return None
        size = hashlib.sha256().digest_size
        return content[:size], np.frombuffer(content[size:], self._number).astype(float)

    def _write_record(self, index: int, content: bytes) -> None:
        is_last = index >= self._num_records
        with self.path.open("r+b") as file:
            file.seek(len(self._header) + index * self._record_size)
            file.write(content + _checksum(content))
            if is_last:
                file.truncate()
            file.flush()
            os.fsync(file.fileno())
        if is_last:
            self._num_records = index + 1


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKSUM_SIZE).digest()
