"""The HTTP side: an OpenAI-compatible API over an `EngineClient`, and the command line."""
