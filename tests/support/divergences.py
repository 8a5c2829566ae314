"""Divergences in NumPy and float64, and how far float32 may be from them."""

import math

import numpy as np

from tests.support.arrays import ULP


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(logits))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def categorical(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def bernoulli(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The mean over the last axis, from logits."""
    yes = lambda z: -np.logaddexp(0.0, -z)  # noqa: E731
    terms = np.exp(yes(p)) * (yes(p) - yes(q))
    return np.mean(terms + np.exp(yes(-p)) * (yes(-p) - yes(-q)), axis=-1)


def rounding(p: np.ndarray, q: np.ndarray, num_terms: int) -> float:
    """Bound on the rounding of a KL that is computed from log-probabilities.

    With logits up to M a log-probability is off by at most e = ULP * (4 M + C + 8):
    a difference of two numbers up to M, and a logarithm of a sum of C exponentials.
    With D the largest log(p / q), up to 2 M + log(C), each term p * log(p / q) is then
    off by p * (2 e + D * (e + 4 ULP)), and their sum by C * ULP * D more.
    """
    largest = max(np.max(np.abs(p)), np.max(np.abs(q)))
    e = ULP * (4 * largest + num_terms + 8)
    d = 2 * largest + math.log(num_terms)
    return float(2 * e + d * (e + (num_terms + 4) * ULP))


def logits(seed: int, shape: tuple[int, ...], scale: float = 3.0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(scale=scale, size=shape)
    return values.astype("float32").astype("float64")
