"""What a weights mode came to, in words: how layers and head are held, and what that was made from.

layers int4 (the file's codes), head int8 (the file's codes)
layers int4 (the file's codes) and int8 (rounded from Q6_K), head int8 (rounded from BF16)
layers and head bfloat16
"""

from __future__ import annotations

from kvloom.engine.model.linear import Linear, LinearWeight
from kvloom.engine.model.quantized import QuantizedLinear, StackedLinear

_CODES = "the file's codes"


class Held:
    """Notes every projection that is made; `str` of it tells the whole."""

    def __init__(self) -> None:
        self._noted: dict[str, dict[str, set[str]]] = {}

    def note(self, part: str, made: Linear, weight: LinearWeight) -> None:
        """part: layers or head."""
        if isinstance(made, StackedLinear):
            for each, run in zip(made.parts, weight.runs()):
                self.note(part, each, run)
            return
        origins = self._noted.setdefault(part, {}).setdefault(made.form, set())
        if isinstance(made, QuantizedLinear) and made.kind == weight.kind():
            origins.add(_CODES)
        elif made.form.startswith("int"):
            origins |= {weight.source.kind(name) for name in weight.names}

    def __str__(self) -> str:
        told = {part: " and ".join(_form(form, forms[form]) for form in sorted(forms)) for part, forms in self._noted.items()}
        if len(set(told.values())) == 1:
            return f"{' and '.join(told)} {next(iter(told.values()))}"
        return ", ".join(f"{part} {text}" for part, text in told.items())


def _form(form: str, origins: set[str]) -> str:
    rounded = ", ".join(sorted(origins - {_CODES}))
    why = "; ".join([*([_CODES] if _CODES in origins else []), *([f"rounded from {rounded}"] if rounded else [])])
    return f"{form} ({why})" if why else form
