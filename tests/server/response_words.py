"""What tests of /v1/responses ask and answer with."""

LOGPROBS = "message.output_text.logprobs"
LOOK = {"type": "function", "name": "look", "description": "Looks.", "strict": False, "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}  # fmt: skip
LIST = {"type": "function", "name": "list_all", "parameters": None, "strict": None}
CALL = '<tool_call>\n{"name": "look", "arguments": {"city": "Bonn"}}\n</tool_call>'
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def ask(client, given="weather in Bonn?", **fields):
    return client.responses.create(model="echo-model", input=given, **fields)


def prompt(served):
    """What the model was given to read."""
    return served.engine.tokenizer.decode(served.engine.calls[-1]["prompt"], skip_special_tokens=False)
