"""Fields of other servers: refused by name where ignoring them would change the answer, accepted where they ask for nothing."""

import pytest

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]

ASKING = [
    *[{"format": value} for value in ({}, {"a": 1}, "")], *[{"stop_regex": value} for value in ("", "a+")], {"choice": ["a"]},
    {"watermarking": True}, {"repeat_last_n": 5}, {"extra_key": "a"}, {"return_tokens": True},
    {"tools": [{}]}, {"tool_choice": "required"}, {"tool_choice": {}}, {"functions": [{"name": "f"}]},
    {"function_call": {"name": "f"}}, {"use_beam_search": True}, {"length_penalty": 0.8}, {"num_beams": 4},
    {"max_new_tokens": 0}, {"n_predict": -1}, {"max_output_tokens": 5}, {"min_new_tokens": 1}, {"do_sample": False},
    {"repeat_penalty": 1.1}, {"stop_sequences": ["a"]}, {"n_probs": 3}, {"typical_p": 0.9}, {"mirostat": 2},
    {"dry_multiplier": 0.5}, {"xtc_probability": 0.5}, {"top_n_sigma": 1.0}, {"samplers": ["top_k"]}, {"min_keep": 2},
    {"logits_processors": ["x"]}, {"custom_logit_processor": "x"}, {"custom_params": {"a": 1}}, {"no_repeat_ngram_size": 3},
    {"random_seed": 0}, {"t_max_predict_ms": 5}, {"repetition_detection": {"max_pattern_size": 2}},
    {"truncation": "auto"}, {"truncate": 4}, {"prompt_embeds": "AA=="},
    {"input_ids": [1]}, {"system": "be brief"}, {"inputs": "x"}, {"documents": [{"text": "x"}]}, {"chat_template": "x"},
    {"mm_processor_kwargs": {"a": 1}}, {"lora_path": "x"}, {"session_params": {"id": 1}}, {"suffix": "x"},
    {"reasoning_effort": "none"}, {"enable_thinking": False}, {"thinking": {"type": "on"}}, {"reasoning": {"effort": "low"}},
    {"thinking_token_budget": 0}, {"verbosity": "low"}, {"include_reasoning": False}, {"separate_reasoning": True},
    {"modalities": ["text", "audio"]}, {"audio": {"voice": "x"}}, {"web_search_options": {}}, {"moderation": {"mode": "block"}},
    {"return_prompt_token_ids": True}, {"return_prompt_text": True}, {"return_hidden_states": True},
    {"extra_body": {"top_k": 1}}, {"nvext": {"greed_sampling": True}}, {"vllm_xargs": {"kvloom_budget": 5}},
    {"options": {"num_ctx": 5}}, {"parameters": {"temperature": 0}}, {"sampling_params": {"temperature": 0}},
    {"extra_args": {"a": 0}}, {"generation_config": {"a": 0}}, {"kv_transfer_params": {"do_remote_decode": True}},
]  # fmt: skip
"""Each alone changes the answer, or would if it were obeyed."""

HARMLESS = [
    {"response_format": {"type": "text"}}, {"tools": []}, {"tools": None}, {"tool_choice": "none"}, {"tool_choice": "auto"},
    {"functions": []}, {"use_beam_search": False}, {"length_penalty": 1.0}, {"best_of": 1}, {"best_of": None},
    {"guided_json": None}, {"regex": None}, {"grammar": ""}, {"structured_outputs": {}}, {"structured_outputs": {"json": None}},
    {"bad_words": []}, {"logits_processors": []}, {"allowed_token_ids": None}, {"truncate_prompt_tokens": None},
    {"repeat_penalty": 1.0}, {"typical_p": 1.0}, {"mirostat": 0}, {"top_n_sigma": -1}, {"do_sample": True}, {"n_probs": 0},
    {"modalities": ["text"]}, {"verbosity": "medium"}, {"include_reasoning": True}, {"separate_reasoning": False},
    {"extra_body": {}}, {"vllm_xargs": {}}, {"options": {}}, {"chat_template": None}, {"documents": []}, {"suffix": ""},
    {"metadata": {"a": "b"}}, {"store": True}, {"service_tier": "auto"}, {"parallel_tool_calls": True}, {"user": "u"},
    {"prompt_cache_key": "k"}, {"safety_identifier": "s"}, {"cache_prompt": True}, {"id_slot": 1}, {"request_id": "r"},
    {"guided_decoding_backend": "xgrammar"}, {"stream_reasoning": True}, {"something_new": {"deep": [1]}},
    {"return_token_ids": False}, {"return_tokens_as_token_ids": None}, {"spaces_between_special_tokens": True},
]  # fmt: skip


def post(served, path, fields):
    body = {"messages": USER} if path == CHAT else {"prompt": "hi"}
    with served.client() as client:
        return client.post(path, json={**body, "max_tokens": 1, **fields})


IN_CHATS = {"tools", "tool_choice", "reasoning_effort", "include_reasoning", "separate_reasoning"}
"""Served there, and only there."""


@pytest.mark.parametrize(
    ("path", "fields"),
    [(path, fields) for path in (CHAT, COMPLETION) for fields in ASKING if path == COMPLETION or not fields.keys() & IN_CHATS],
    ids=str,
)
def test_what_would_change_the_answer_is_refused_by_name(served, path, fields):
    reply = post(served, path, fields)
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == next(iter(fields)), error
    assert error["param"] in error["message"] and "not supported" in error["message"]


@pytest.mark.parametrize("fields", HARMLESS, ids=str)
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_what_asks_for_nothing_is_accepted(served, path, fields):
    assert post(served, path, fields).status_code == 200


@pytest.mark.parametrize(
    ("options", "param"),
    [({"include_usage": True, "include_obfuscation": False}, None), ({"include_obfuscation": True}, "include_obfuscation"),
     ({"usage_every": 5}, "usage_every"), ({"usage_every": None}, None)],
)  # fmt: skip
def test_keys_of_stream_options(served, options, param):
    reply = post(served, CHAT, {"stream": True, "stream_options": options})
    assert reply.status_code == (200 if param is None else 400)
    assert param is None or reply.json()["error"]["param"] == f"stream_options.{param}"


@pytest.mark.parametrize("name", ["prefix", "audio", "function_call", "images"])
def test_fields_of_messages(served, name):
    reply = post(served, CHAT, {"messages": [*USER, {"role": "assistant", "content": "a", name: [{"id": 1}]}]})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == f"messages[1].{name}"


def test_thoughts_of_earlier_turns_reach_the_template():
    from kvloom.server.schema.chat_messages import Message

    turn = Message(role="assistant", content="a", reasoning_content="because")
    assert turn.for_template() == {"role": "assistant", "content": "a", "reasoning_content": "because", "reasoning": "because"}


def test_tokenize_counts_what_a_chat_would_send(served):
    """An open turn, and variables of the template; what would count otherwise is refused."""
    talk = {"messages": [*USER, {"role": "assistant", "content": "Sure, "}]}
    tokenizer = served.engine.tokenizer
    with served.client() as client:
        reply = client.post("/tokenize", json={**talk, "continue_final_message": True, "chat_template_kwargs": {"x": 1}})
        refused = [client.post("/tokenize", json={**talk, **more}) for more in ({"system": "x"}, {"chat_template": "x"})]
    assert tokenizer.decode(reply.json()["tokens"]).endswith("assistant\nSure, ")
    assert [reply.status_code for reply in refused] == [400, 400]
