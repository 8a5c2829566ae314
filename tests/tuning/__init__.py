"""Comparison of settings: `keras_nrs.tuning`."""
