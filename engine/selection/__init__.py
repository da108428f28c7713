"""What does a step read? Methods that decide which positions each query row sees.

dense    every position up to the row's own
"""

from kvloom.engine.selection.dense import dense_rows

SELECTIONS = ("dense",)

__all__ = ["SELECTIONS", "dense_rows"]
