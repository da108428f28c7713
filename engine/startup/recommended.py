"""What requests that do not say are sampled with: what the model recommends, or what its operator says.

    auto      the built-in model's card; generation_config.json of a folder; `general.sampling.*` of a GGUF
    none      OpenAI's defaults
    FILE      another generation_config.json, or its folder; its max_new_tokens is the most that any answer has
    override  on top of each of these; its max_new_tokens likewise

Names and meanings are vLLM's (https://docs.vllm.ai, `generation_config`): whether `do_sample` is there does not matter, and
`max_new_tokens` of the model's own file is only a default for chats.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvloom.engine.client import OPENAI_SOURCE
from kvloom.engine.config import ModelOptions
from kvloom.engine.errors import ConfigError, InvalidRequestError, KVLoomError, ModelError
from kvloom.engine.model.files import read_json, read_json_if_there, shown
from kvloom.engine.model.gguf_file import GGUFFile
from kvloom.engine.requests.sampling import OPENAI_SAMPLING, SamplingDefaults, SamplingParams
from kvloom.engine.settings.options import json_object
from kvloom.engine.startup.catalog import ModelFiles

log = logging.getLogger("kvloom.model")

FILE = "generation_config.json"
NAMES = (*OPENAI_SAMPLING.drawing(), "max_new_tokens")
GGUF_NAMES = {
    "temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}  # fmt: skip
"""Behind `general.sampling.` -> here. A repetition penalty counts the whole prompt and answer, as everywhere here; llama.cpp's
counts as many tokens as `penalty_last_n` says."""
GGUF_SWITCHES = ("xtc_probability", "mirostat")
"""Samplers that are not served, and on where these are not 0."""


def sampling_defaults(options: ModelOptions, files: ModelFiles, gguf: GGUFFile | None) -> tuple[SamplingDefaults, str]:
    """The defaults, and who says so. gguf: the file, if the model is one. Raises ConfigError or ModelError for a value that is
    out of range."""
    defaults, source = _recommended(options.generation_config, files, gguf)
    if options.override_generation_config is not None:
        over = json_object("override_generation_config", options.override_generation_config, '{"temperature": 0.6}')
        if unknown := [name for name in over if name not in NAMES]:
            raise ConfigError(f"override_generation_config holds {shown(unknown[0])}; allowed: {', '.join(NAMES)}")
        made = _read(over, "override_generation_config", ConfigError, base=defaults)
        defaults = made._replace(most_tokens=made.max_tokens) if over.get("max_new_tokens") is not None else made
        source = ", ".join([source] * (source != OPENAI_SOURCE) + ["--override-generation-config"])
    return defaults, source


def _recommended(given: str, files: ModelFiles, gguf: GGUFFile | None) -> tuple[SamplingDefaults, str]:
    if given in ("none", "vllm"):
        return OPENAI_SAMPLING, OPENAI_SOURCE
    if given != "auto":
        path = _file(given)
        try:
            values = read_json(path)
        except ModelError as error:
            raise ConfigError(f"generation_config: {error.__cause__ or error}") from None
        made = _read(values, str(path), ConfigError)
        return made._replace(most_tokens=made.max_tokens), str(path)
    if files.sampling is not None:
        return files.sampling, "the model's card"
    if gguf is not None:
        found, name = _read(_of_gguf(gguf), f"{files.path}: general.sampling", ModelError), "the file's general.sampling"
    else:
        values = read_json_if_there(files.path / FILE)
        found, name = _read(values, str(files.path / FILE), ModelError), FILE
    return found, OPENAI_SOURCE if found == OPENAI_SAMPLING else name


def _file(given: str) -> Path:
    path = Path(given).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"generation_config is {shown(given)}, but there is no file {path}; allowed: auto, none, or a "
                          f"{FILE} or its folder")  # fmt: skip
    return path


def _of_gguf(gguf: GGUFFile) -> dict[str, Any]:
    """What the metadata says, by generation_config's names. Numbers are stored in fp32, and are meant as they are written."""
    begin = "general.sampling."
    given = {key.removeprefix(begin): value for key, value in gguf.metadata.items() if key.startswith(begin)}
    if left := [name for name in GGUF_SWITCHES if given.get(name)]:
        log.warning("%s recommends %s, which is not served; its other recommendations are", gguf.path, ", ".join(left))
    plain = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in given.items()}
    return {name: plain[key] for key, name in GGUF_NAMES.items() if key in plain}


def _read(
    values: Mapping[str, Any], where: str, kind: type[KVLoomError], base: SamplingDefaults = OPENAI_SAMPLING
) -> SamplingDefaults:
    """`base`, and what a file says on top of it. What it leaves out or says is null is as before."""
    given = {name: values[name] for name in NAMES if values.get(name) is not None}
    for name in ("top_k", "max_new_tokens"):
        if isinstance(given.get(name), float) and given[name].is_integer():
            given[name] = int(given[name])
    if "max_new_tokens" in given:
        given["max_tokens"] = given.pop("max_new_tokens")
    try:
        SamplingParams(**given)
    except InvalidRequestError as error:
        told = str(error).replace("max_tokens", "max_new_tokens")
        raise kind(f"{where}: {told}; correct it, or start with --generation-config none") from None
    return base._replace(**given)
