"""The experiments behind docs/results.md. They are not part of the package."""
