"""Response templates of checkpoints, in the forms that transformers knows."""

FUNCTION = {"type": "function", "function": "{content}"}
NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
TAGS = {
    "start_anchor": "<|im_start|>assistant\n",
    "defaults": {"role": "assistant"},
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {"open_pattern": r"\s*<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json",
                       "transform": FUNCTION},
        "content": {"close": "<|im_end|>"},
    },
}  # fmt: skip
CHANNELS = {
    "version": 1,
    "start_anchor": "<|start|>assistant",
    "fields": {
        "thinking": {"open": "<|channel|>analysis<|message|>", "close": "<|end|>"},
        "content": {"open": "<|channel|>final<|message|>", "close": ["<|end|>", "<|return|>"]},
        "tool_calls": {"open_pattern": r"<\|channel\|>commentary to=functions\.(?P<name>\w+).*?<\|message\|>", "repeats": True,
                       "close": "<|call|>", "content": "json", "transform": NAMED},
    },
}  # fmt: skip
LISTED = {
    "start_anchor_pattern": r"<BOT>\s*",
    "fields": {
        "reasoning": {"open_pattern": r"(?:^|<think>\s*)", "close": "</think>"},
        "tool_calls": {"open": "<A>", "close": "</A>", "content": "json", "transform_each": True,
                       "transform": {"function": {"name": "{tool}", "arguments": "{parameters}"}}},
        "content": {"open": "<R>", "close_pattern": r"\n?</R>"},
        "citations": {"open": "<C>", "close": "</C>"},
    },
}  # fmt: skip
FRAMED = {
    "start_anchor": "<|m|>",
    "fields": {
        "thinking": {"open_pattern": r"(?:<\|m\|>)?[^<]*<\|think\|>", "close": "<|e|>", "repeats": True, "join": " + ",
                     "content_args": {"strip": False}},
        "content": {"open_pattern": r"(?:<\|m\|>)?[^<]*<\|text\|>", "close": "<|e|>", "repeats": True, "join": "",
                    "content_args": {"strip": False}},
        "tool_calls": {"open": "<|call|>", "close_pattern": r"<\|(?P<name>\w+)\|>", "content": "kv-lines", "transform": NAMED,
                       "content_args": {"value_parser": {"name": "json", "args": {"allow_non_json": True}}}},
    },
}  # fmt: skip
PYTHON = {
    "start_anchor": "<B>",
    "fields": {
        "tool_calls": {"open": "<P>", "content": "python-call-list", "transform_each": True,
                       "transform": {"function": {"name": "{name}", "arguments": "{arguments}"}}},
        "content": {},
    },
}  # fmt: skip
