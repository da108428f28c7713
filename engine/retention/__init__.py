"""What stays in memory? Rules for which KV heads keep which positions.

everything    one head group, whole sequences
razor         two head groups: retrieval heads keep everything, local heads sinks and a window (RazorAttention)
"""

RETENTION = ("everything", "razor")

__all__ = ["RETENTION"]
