"""One training step: Equation 3 on a batch."""
