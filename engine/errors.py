"""Every error kvloom raises on purpose. A message says what was given, what is allowed and what to do.

KVLoomError
  InvalidRequestError      the caller's request cannot be served as written            HTTP 400
    ContextLengthError     prompt, or prompt + max_tokens, beyond what can ever fit    HTTP 400
  ModelNotFoundError       no such model here                                          HTTP 404
  OverloadedError          too much waiting; try again later                           HTTP 429
  ModelError               a model's files are absent, broken or unsupported           start-up
  ConfigError              settings that cannot work                                   start-up
  EngineDeadError          the engine thread has ended                                 HTTP 503
  InternalError            something of the engine's own failed for one caller         HTTP 500
"""

from __future__ import annotations


class KVLoomError(Exception):
    """Base of all errors raised on purpose."""


class InvalidRequestError(KVLoomError, ValueError):
    """A request that can never be served as written. `param` names the offending field, if one is to blame."""

    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """The request needs more positions than the model or the cache has."""

    code = "context_length_exceeded"

    @classmethod
    def beyond(cls, longest: int, why: str, param: str | None) -> ContextLengthError:
        """The error in words that begin as OpenAI's do, by which clients and gateways know it. longest: tokens that there is
        room for; why: what was given, and what to do."""
        return cls(f"This model's maximum context length is {longest} tokens. However, {why}", param)


class ModelNotFoundError(KVLoomError):
    """The named model is neither built in, nor a file, nor served here."""


class OverloadedError(KVLoomError):
    """The waiting queue is full. `retry_after` is a hint in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ModelError(KVLoomError):
    """A model's files are absent, damaged, or of a kind that is not supported."""


class ConfigError(KVLoomError, ValueError):
    """Settings that cannot work, alone or together."""


class EngineDeadError(KVLoomError):
    """The engine thread has ended; nothing can be generated until the process is restarted."""


class InternalError(KVLoomError):
    """Something of the engine's own failed for one caller. Its message says nothing of what; the log does."""
