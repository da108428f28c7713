"""How far what a step computed may be found by others: it must be what a cold run over the same tokens computes.

dense prompts    a row that saw everything, on KV that is all exact
sparse prompts   whole cells of the method's grid, computed as prompt rows; below `Selector.dense_until` prompt rows see
                 everything, and there decode rows that did are as good
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvloom.engine.requests.plan import Chunk


def exact_until(chunk: Chunk, *, saw_everything: bool) -> int:
    """One past the last position of a chunk whose KV a cold run gives, if all KV before the chunk is such: start to stop.

    saw_everything: of decode rows, whether they read every position in every layer.
    """
    selector = chunk.request.selector
    if not saw_everything:
        return chunk.start
    if selector is None or chunk.stop <= selector.dense_until:
        return chunk.stop
    if chunk.decodes:
        return chunk.start
    return max(chunk.start, chunk.stop // selector.grid * selector.grid)  # a cell that is cut off chose for other rows
