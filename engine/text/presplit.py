"""How text is cut into words before byte-level BPE merges, by the name a GGUF gives (`tokenizer.ggml.pre`).

The rules are those of the models' own tokenizer.json, as collected in llama.cpp's vocabulary loader. A rule is a list of
regular expressions: each isolates its matches inside the pieces the one before left, and what nothing matches stays a piece.

SmolLM cuts digits out first. transformers' GGUF reader does not know that and cuts whitespace before digits differently
("\\n\\n1"), so it departs there from the tokens the model was trained on; kvloom does not.
"""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Regex, pre_tokenizers

from kvloom.engine.errors import ModelError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN35 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_GPT4O = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


class PreSplit(NamedTuple):
    """A rule, and what else a name stands for."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    """A word that is a token is taken whole, without looking at merges."""
    adds_bos: bool = False
    """Whether encoding adds bos where the file does not say."""
    nfc: bool = False
    """The model's own tokenizer normalises text to NFC first."""

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The rule in the `tokenizers` library, ending in bytes written as characters."""
        cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_RULES: dict[PreSplit, tuple[str, ...]] = {
    PreSplit(_DEFAULT): ("default",),
    PreSplit((_GPT2,)): ("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling", "mellum"),
    PreSplit((r"\p{N}", _GPT2)): ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"),
    PreSplit((r"\p{N}", _GPT2), nfc=True): ("command-r",),
    PreSplit((_LLAMA3,), whole_words=True, adds_bos=True): (
        "llama3",
        "llama-v3",
        "llama-bpe",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
    ),
    PreSplit((_LLAMA3,)): ("dbrx", "smaug-bpe"),
    PreSplit((_QWEN2,), nfc=True): ("qwen2",),
    PreSplit((_QWEN2,)): ("deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "solar-open"),
    PreSplit((_QWEN35,)): ("qwen35",),
    PreSplit((_TEKKEN,), whole_words=True, adds_bos=True): ("tekken",),
    PreSplit((_GPT4O,)): ("gpt-4o", "llama4"),
    PreSplit(_FALCON): ("falcon",),
}
_BY_NAME = {name: rule for rule, names in _RULES.items() for name in names}


def presplit(name: str) -> PreSplit:
    """The rule of that name. Raises ModelError for one that is not known: wrong cuts would silently spoil the output."""
    rule = _BY_NAME.get(name)
    if rule is None:
        raise ModelError(
            f"tokenizer.ggml.pre is {name!r}, which is not supported; supported: {', '.join(sorted(_BY_NAME))}. Load the model "
            f"from its safetensors folder, which brings its own tokenizer.json"
        )
    return rule
