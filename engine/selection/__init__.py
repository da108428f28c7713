"""What does a step read? Methods that decide which positions each query row sees.

dense          every position up to the row's own (no selector at all)
sink_window    the first tokens and the last ones: the baseline of all others
token_select   one list per layer by a vote of all heads, used again while the query stays alike; sparse prompts too
tidal_decode   lists made in a few layers of every step, read by the layers behind them
recycled       lists by attention score per layer and KV head, used again until a stride or the query's drift renews them
razor_view     everything, or another method, for retrieval heads; sinks, a window and a compensation token for all others
"""

from kvloom.engine.requests.stats import MethodStats
from kvloom.engine.selection.base import Method, Selector
from kvloom.engine.selection.batch import Batch, Scratch
from kvloom.engine.selection.dense import dense_rows
from kvloom.engine.selection.geometry import Geometry
from kvloom.engine.selection.razor_view import RazorView, RazorViewOptions
from kvloom.engine.selection.recycled import Recycled, RecycledOptions
from kvloom.engine.selection.sink_window import SinkWindow, SinkWindowOptions
from kvloom.engine.selection.tidal_decode import TidalDecode, TidalDecodeOptions
from kvloom.engine.selection.token_select import TokenSelect, TokenSelectOptions

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("sink_window", "first tokens and a window of the last", SinkWindowOptions, SinkWindow),
        Method("token_select", "one list per layer, voted for by all heads (TokenSelect)", TokenSelectOptions, TokenSelect),
        Method("tidal_decode", "a few layers choose for all others (TidalDecode, Kascade)", TidalDecodeOptions, TidalDecode),
        Method("recycled", "lists by score, renewed every few tokens (Recycled Attention)", RecycledOptions, Recycled),
        Method(
            "razor_view",
            "retrieval heads see everything, others sinks and a window (RazorAttention)",
            RazorViewOptions,
            lambda options, budget, geometry, kernels: RazorView(options, budget, geometry, kernels, METHODS),
            takes_budget=RazorViewOptions.takes_budget,
        ),
    )
}
SELECTIONS = ("dense", *METHODS)

__all__ = ["METHODS", "SELECTIONS", "Batch", "Geometry", "Method", "MethodStats", "Scratch", "Selector", "dense_rows"]
