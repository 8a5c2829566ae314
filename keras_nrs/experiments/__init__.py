"""Experiments that compare NRS with its controls: `keras-nrs demo` runs one."""
