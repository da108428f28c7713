"""Where does KV come from? Ways to reuse KV that is already stored.

off      neither look up nor publish: the request leaves nothing behind
exact    the longest prefix whose tokens, domain and positions are the same (lossless)
approx   beside it, KVShare: segments of other prompts at any position, repaired where it matters (`kvshare`)
"""

REUSE = ("off", "exact", "approx")

__all__ = ["REUSE"]
