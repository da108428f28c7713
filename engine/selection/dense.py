"""Dense: every row sees every position up to its own. The default, and what the other methods are measured against."""

from torch import Tensor

from kvloom.kernels.interface import Rows, Spans


def dense_rows(tables: Tensor, request: Tensor, stop: Tensor, zeros: Tensor, spans: Spans | None = None) -> Rows:
    """Rows whose tail is the whole sequence.

    tables: [requests, max_blocks]; request, stop: [rows]; zeros: [rows] of zeros. All int32; stop is position + 1.
    spans: what the host knows of them, for kernels that want it.
    """
    return Rows(tables, request, zeros, stop, spans=spans)
