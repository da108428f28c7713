"""Which tokens end an answer, whatever format the model came in.

    stated      by the model's files: config.json, generation_config.json, tokenizer_config.json; eos, eot and eom of a GGUF
    turn ends   what the chat template writes right behind an assistant's words: a model that was trained on that template ends
                its answer with it, whether or not a file says so

Promises that every one of them is a token that the model has.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from kvloom.engine.errors import KVLoomError, ModelError
from kvloom.engine.text.chat_template import template_of
from kvloom.engine.text.tokenizer import Tokenizer

log = logging.getLogger("kvloom.model")

_ASKED, _ANSWERED, _ON = "kvloomasks", "kvloomanswers", "kvloomgoeson"  # plain words that no template writes itself
_MARK = re.compile(r"[<\[].*[>\]]", re.DOTALL)
"""What a token looks like that structures a chat; some files forget to mark it as special."""


def end_tokens(tokenizer: Tokenizer, stated: Iterable[int], vocab_size: int, where: object) -> frozenset[int]:
    """Tokens that end an answer. stated: by the model's configuration, beside those the tokenizer knows; vocab_size: rows of
    the embedding; where: named in warnings. Ids that the model does not have are left out, with a warning."""
    known = dict.fromkeys((*stated, *tokenizer.eos_ids))
    usable = {token for token in known if 0 <= token < vocab_size}
    if outside := [token for token in known if token not in usable]:
        log.warning("%s: end tokens %s are outside the vocabulary, 0 to %d; they are ignored", where, outside, vocab_size - 1)
    added = {token for token in turn_ends(tokenizer, where) if token < vocab_size} - usable
    if added:
        names = ", ".join(f"{tokenizer.special_text(token)} ({token})" for token in sorted(added))
        log.warning("%s: the chat template ends turns with %s, which no end token names; it ends answers too", where, names)
    if not usable | added:
        log.warning("%s: the model has no end token; answers run until max_tokens or a stop string", where)
    return frozenset(usable | added)


def turn_ends(tokenizer: Tokenizer, where: object = "the model") -> tuple[int, ...]:
    """The token that the chat template writes right behind an assistant's words (blanks aside), when the chat goes on.

    Empty without a template, or if there stands no token of the kind that structures a chat."""
    if tokenizer.chat_template is None:
        return ()
    chat = [("user", _ASKED), ("assistant", _ANSWERED), ("user", _ON)]
    try:
        text = template_of(tokenizer).render([{"role": role, "content": content} for role, content in chat])
    except ModelError as error:
        log.warning("%s: %s; chat requests cannot be answered", where, error)
        return ()
    except KVLoomError:  # a template for other chats than this one
        return ()
    _, found, behind = text.rpartition(_ANSWERED)
    behind = behind.lstrip()
    marks = [(token.content, i) for i, token in tokenizer.backend.get_added_tokens_decoder().items()
             if token.special or _MARK.fullmatch(token.content)]  # fmt: skip
    matching = [(len(content), i) for content, i in marks if found and content.strip() and behind.startswith(content)]
    return (max(matching)[1],) if matching else ()


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: object) -> None:
    """Compare the tokenizer with the rows of the embedding. Raises ModelError if no text could be encoded at all."""
    if tokenizer.vocab_size > vocab_size:
        log.warning(
            "%s: the tokenizer has %d tokens, the model %d; text that needs the others is refused",
            where, tokenizer.vocab_size, vocab_size,
        )  # fmt: skip
    beyond = [token for token in tokenizer.encode("a") if token >= vocab_size]
    if beyond:
        raise ModelError(
            f"{where}: the tokenizer encodes even 'a' with token {beyond[0]}, but the model has {vocab_size}; take the "
            f"tokenizer that belongs to the model"
        )
