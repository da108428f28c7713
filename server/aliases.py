"""Other servers' names of settings, so that a command line that starts vLLM mostly starts kvloom, too.

    renamed     the same setting under another name: --max-num-batched-tokens is --max-batched-tokens
    switches    a flag without a value that stands for a value here: --no-enable-prefix-caching is --reuse off
    only        a setting that has one value here: --tensor-parallel-size 1 is accepted, 2 is refused with the reason

The same names are taken in a YAML file. What none of this knows is refused, with the nearest name.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvloom.engine.errors import ConfigError

RENAMED = {
    "alias": "served_model_name",
    "chat_template_file": "chat_template",
    "context_length": "max_model_len",
    "ctx_size": "max_model_len",
    "disable_log_requests": "no_access_log",
    "disable_overlap_schedule": "no_async_scheduling",
    "kv_cache_memory_bytes": "kv_memory",
    "kv_cache_memory": "kv_memory",
    "mem_fraction_static": "gpu_memory_utilization",
    "max_concurrent_requests": "max_num_seqs",
    "max_num_batched_tokens": "max_batched_tokens",
    "max_running_requests": "max_num_seqs",
    "parallel": "max_num_seqs",
    "scheduling_policy": "scheduler",
    "allowed_origins": "cors",
    "uvicorn_log_level": "log_level",
}
"""Name elsewhere -> name here."""


class Switch(NamedTuple):
    """What a flag without a value stands for."""

    setting: str
    value: str


SWITCHES = {
    "enable_prefix_caching": Switch("reuse", "exact"),
    "no_enable_prefix_caching": Switch("reuse", "off"),
    "disable_radix_cache": Switch("reuse", "off"),
}


class Only(NamedTuple):
    """The one value that a setting can have here."""

    values: tuple[str, ...]
    """As they may be written; "" where the flag has no value."""
    reason: str


_ONE = "kvloom runs on one machine's CPU or one GPU for now"
ONLY = {
    "tensor_parallel_size": Only(("1",), _ONE),
    "pipeline_parallel_size": Only(("1",), _ONE),
    "data_parallel_size": Only(("1",), _ONE),
    "enable_chunked_prefill": Only(("",), "prompts are always computed in chunks"),
    "chat_template_content_format": Only(("auto",), "a template gets the form of content that it reads"),
    "kv_cache_dtype": Only(("auto", "bfloat16"), "KV is stored in --dtype"),
    "load_format": Only(("auto", "safetensors", "gguf"), "the files themselves say what they are"),
    "runner": Only(("auto", "generate"), "kvloom generates text"),
    "task": Only(("auto", "generate"), "kvloom generates text"),
    "tokenizer_mode": Only(("auto", "hf"), "the model's own tokenizer.json is used"),
}


def flags(words: Sequence[str]) -> list[str]:
    """A command line with other servers' flags in kvloom's own. Raises ConfigError for a value that cannot be had here.

    Where the model comes first, as vLLM has it, all words behind --served-model-name are names."""
    model_first = len(words) > 1 and not words[1].startswith("-")
    found: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        if name in RENAMED:
            waiting.insert(0, "--" + RENAMED[name].replace("_", "-") + equals + value)
        elif name == "served_model_name" and not equals and model_first:
            names = list(itertools.takewhile(lambda text: not text.startswith("-"), waiting))
            del waiting[: len(names)]
            found += [item for name in names for item in (flag, name)] or [flag]
        elif name in SWITCHES and not equals:
            found += ["--" + SWITCHES[name].setting, SWITCHES[name].value]
        elif name in ONLY:
            if not equals and ONLY[name].values != ("",):
                value = waiting.pop(0) if waiting else ""
            _check(flag, name, value)
        else:
            found.append(word)
    return found


def settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a YAML file's mapping, whose names have underscores."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in SWITCHES:
            on, here = SWITCHES[name].value, SWITCHES[name].setting
            found[here] = on if value else {"exact": "off", "off": "exact"}[on]
        elif name in ONLY:
            _check(name, name, "" if value is True else str(value))
        elif name == "disable_log_requests":
            found["access_log"] = not value
        else:
            found[RENAMED.get(name, name)] = value
    return found


def _check(shown: str, name: str, value: str) -> None:
    only = ONLY[name]
    if value not in only.values:
        allowed = " or ".join(only.values) if any(only.values) else "no value"
        raise ConfigError(f"{shown} is {value!r}; allowed: {allowed}, as {only.reason}")
