"""Anthropic's messages: what they are as chats, and answers and errors as its clients read them."""
