"""What stays in memory? Rules for which KV heads keep which positions.

everything    one head group, whole sequences
razor         two head groups: retrieval heads keep everything, local heads sinks and a window (RazorAttention)
"""

from kvloom.engine.retention.base import Method, Retention
from kvloom.engine.retention.razor import Razor, RazorOptions

RETENTIONS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("everything", "whole sequences of all heads", None, lambda *_: None),
        Method("razor", "local heads keep sinks and a window alone (RazorAttention)", RazorOptions, Razor),
    )
}

__all__ = ["RETENTIONS", "Method", "Retention"]
