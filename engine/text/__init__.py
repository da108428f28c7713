"""Text in and out: tokenizer, chat template, incremental detokenizer."""

from kvloom.engine.text.chat_template import ChatTemplate, template_of
from kvloom.engine.text.detokenizer import Delta, IncrementalDetokenizer
from kvloom.engine.text.ends import check_vocabulary, end_tokens
from kvloom.engine.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Delta", "IncrementalDetokenizer", "Tokenizer", "check_vocabulary", "end_tokens", "template_of"]
