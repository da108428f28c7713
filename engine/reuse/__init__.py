"""Where does KV come from? Ways to reuse KV that is already stored.

off      neither look up nor publish: the request leaves nothing behind
exact    the longest prefix whose tokens, domain and positions are the same (lossless)
"""

REUSE = ("off", "exact")

__all__ = ["REUSE"]
