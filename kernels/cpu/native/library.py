"""The built library as Python sees it: its functions and the layout of its argument structures.

A call packs its arguments into bytes and passes their address: one `struct.pack` costs about as much as three ctypes
conversions, and, being a fresh object, needs no lock. While a graph is captured, the bytes are kept to be passed again.
Layouts mirror csrc/abi.h; sizes are compared when loading.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvloom.kernels.trust import foreign

from .build import PREBUILT
from .compiler import NativeUnavailable
from .paths import GENERIC, Paths

if TYPE_CHECKING:
    from .graph import Piece

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Layout(NamedTuple):
    """A structure of csrc/abi.h."""

    struct: struct.Struct
    rows_at: int
    """Where its int64 `rows` lies, in bytes; -1 if it has none."""


def _layout(fields: str) -> Layout:
    """From `name:code` pairs, where code is struct's: P pointer, q int64, i int32, f float."""
    pairs = [field.split(":") for field in fields.split()]
    codes = "".join(code for _, code in pairs)
    before = "".join(code for _, code in pairs[: pairs.index(["rows", "q"])]) if ["rows", "q"] in pairs else None
    at = -1 if before is None else struct.calcsize("@" + before + "0q")
    return Layout(struct.Struct("@" + codes + "0q"), at)  # 0q: padded to 8 bytes at the end, as C does


_PAGED = "data:P block:q head:q slot:q "

ROWS = _layout(
    "tables:P request:P start:P stop:P positions:P offsets:P lengths:P most:P table_stride:q "
    "rows:i start_heads:i list_heads:i q_heads:i kv_heads:i head_dim:i threads:i"
)
TOTALS = _layout("rows:q positions:q kv_bytes:q score_bytes:q list_kv_bytes:q")
ATTEND = _layout(
    "q:P q_row:q q_head:q out:P out_row:q out_head:q lse:P lse_row:q logits:P "
    "logits_rows:q logits_row:q logits_head:q width:q " + _PAGED + _PAGED + "block_size:q plan:P "
    "active:P heads:P positions:P read:P sums:P sums_at:P counts:P totals:P scale:f dtype:i"
)
NORM = _layout(
    "x:P x_row:q delta:P delta_row:q weight:P out:P out_row:q rows:q hidden:q eps:f x_dtype:i weight_dtype:i dtype:i threads:i"
)
ROTATE_STORE = _layout(
    "qkv:P qkv_row:q cos:P sin:P angle_row:q positions:P slots:P "
    + _PAGED
    + _PAGED
    + "block_size:q q:P q_row:q q_head:q q_norm:P k_norm:P rows:q "
    "q_heads:i kv_heads:i head_dim:i rotary:i eps:f norm_dtype:i dtype:i threads:i"
)
STORE = _layout(
    "k:P k_row:q k_head:q v:P v_row:q v_head:q "
    + _PAGED
    + _PAGED
    + "block_size:q slots:P rows:q row_bytes_per_head:q heads:i item_bytes:i threads:i"
)
ROTATE = _layout(
    "k:P k_row:q k_head:q out:P out_row:q out_head:q delta:P inv_freq:P rows:q heads:i head_dim:i rotary:i dtype:i threads:i"
)
FOLD = _layout(
    _PAGED + _PAGED + "block_size:q tables:P table_stride:q request:P first:P last:P at:P sums:P rows:q "
    "kv_heads:i head_dim:i origin:i dtype:i threads:i"
)
SELECT = _layout(
    "scores:P scores_row:q score_head:q lengths:P offset:P columns:P at:P columns_row:q columns_head:q counts:P rows:q "
    "heads:i k:i threads:i"
)
RENEW = _layout(
    "q:P q_row:q q_head:q cos:P sin:P words:P at:P stop:P due:P active:P start:P lengths:P counts:P rows:q tail_at:q "
    "query_at:q q_heads:i head_dim:i rotary:i compare:i recent:i most:i width:i lists:i dense:i dtype:i threshold:f"
)
POOL = _layout(
    "logits:P logits_row:q logits_head:q first:P last:P active:P out:P out_row:q out_group:q rows:q "
    "q_heads:i groups:i window:i maximum:i threads:i"
)
SAMPLE = _layout("logits:P logits_row:q how:P out:P bits:P bits_row:q mask:P rows:q vocab:q threads:i")
LINEAR = _layout(
    "x:P x_row:q out:P out_row:q residual:P residual_row:q bias:P packed:P rows:q inputs:q outputs:q "
    "format:i dtype:i out_dtype:i bias_dtype:i residual_dtype:i threads:i "
    "one_panel_rows:i stored_rows:i tile_rows:i"
)
SILU = _layout("gate_up:P in_row:q out:P out_row:q rows:q intermediate:q dtype:i threads:i")
PACK = _layout("blocks:P packed:P inputs:q outputs:q format:i threads:i")
ROWS_OF = _layout("packed:P indices:P out:P out_row:q rows:q inputs:q outputs:q format:i dtype:i threads:i")

CALL = _layout("run:P args:P rows_in:P")

# In the order of kvloom_sizes.
_LAYOUTS = (
    ROWS, TOTALS, ATTEND, NORM, ROTATE_STORE, STORE, ROTATE, FOLD, SELECT, RENEW, POOL, SAMPLE, LINEAR, SILU, PACK,
    ROWS_OF, CALL,
)  # fmt: skip

_FUNCTIONS = {
    "attend": ATTEND,
    "add_rms_norm": NORM,
    "rotate_store": ROTATE_STORE,
    "store": STORE,
    "rotate": ROTATE,
    "fold": FOLD,
    "select": SELECT,
    "renew": RENEW,
    "pool": POOL,
    "sample": SAMPLE,
    "linear": LINEAR,
    "silu_mul": SILU,
    "linear_pack": PACK,
    "linear_rows": ROWS_OF,
}


class Function:
    """A function of the library that takes one structure: called with the structure's fields."""

    __slots__ = ("_library", "_run", "address", "layout")

    def __init__(self, library: Library, run: Any, layout: Layout) -> None:
        self._library, self._run, self.layout = library, run, layout
        self.address = ctypes.cast(run, ctypes.c_void_p).value
        """Of its code."""

    def __call__(self, *fields: int | float) -> None:
        packed = self.layout.struct.pack(*fields)
        self._run(packed)
        if (piece := self._library.capture) is not None:
            piece.add(self, packed)


class Library:
    """Functions of one built library, with their argument types set. Calls release the interpreter lock."""

    def __init__(self, path: Path, paths: Paths = GENERIC) -> None:
        """paths: those that calls are to take."""
        try:
            if path.parent != PREBUILT and (problem := foreign(path)) is not None:  # that is beside this very file
                raise NativeUnavailable(f"{path} is not loaded: {problem}")
            self.handle = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeUnavailable(f"{path} does not load: {error}") from error
        self._check_layouts(path)
        self.paths = paths.within(self._function("tiles", result=ctypes.c_int32)())
        self._captures = threading.local()
        for name, layout in _FUNCTIONS.items():
            setattr(self, name, Function(self, self._function(name, ctypes.c_void_p), layout))
        pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self.plan = self._function("plan", pointer, pointer, result=pointer)
        self.plan_free = self._function("plan_free", pointer)
        self.replay = self._function("replay", pointer, int64, int64)
        self.linear_bytes = self._function("linear_bytes", int64, int64, int32, result=int64)

    @property
    def capture(self) -> Piece | None:
        """What this thread's calls are added to now."""
        return getattr(self._captures, "piece", None)

    @capture.setter
    def capture(self, piece: Piece | None) -> None:
        self._captures.piece = piece

    def __getattr__(self, name: str) -> Any:  # the functions set by name above
        raise AttributeError(name)

    def _function(self, name: str, *arguments: Any, result: Any = None) -> Any:
        function = getattr(self.handle, f"kvloom_{name}")
        function.argtypes, function.restype = arguments, result
        return function

    def _check_layouts(self, path: Path) -> None:
        sizes = (ctypes.c_int64 * len(_LAYOUTS))()
        self._function("sizes", ctypes.c_void_p)(ctypes.addressof(sizes))
        if list(sizes) != [layout.struct.size for layout in _LAYOUTS]:
            raise NativeUnavailable(f"{path} and library.py disagree about argument layouts; this is a defect")
