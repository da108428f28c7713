"""OpenAI's /v1/responses: its items as a conversation, its events, and the store of what was answered."""
