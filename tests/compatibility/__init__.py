"""The rows of `docs/compatibility.md`, each with a function that tries it.

`python -m tests.compatibility` tries every row on every backend and writes the page.
`test_table.py` tries in the suite the rows that no other test covers.
"""
