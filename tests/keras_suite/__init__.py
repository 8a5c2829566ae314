"""Keras's own tests, run with every model wrapped before it is trained."""
