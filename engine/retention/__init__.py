"""What stays in memory? Rules for which KV heads keep which positions.

everything    one head group, whole sequences
"""

RETENTION = ("everything",)

__all__ = ["RETENTION"]
