"""Settings from the environment and keys from files: every setting, what wins, and what is refused."""

import dataclasses
import os
import stat

import pytest

from kvloom.engine.config import all_options
from kvloom.engine.errors import ConfigError
from kvloom.server import cli, environment
from kvloom.server.options import allowed_values, server_options

OPTIONS = {option.name: option for option in (*(option for _, option in all_options()), *server_options())}
SAMPLES = {  # (text, another text); what numbers and lists may be follows from the type
    "block_size": ("32", "64"), "gpu_memory_utilization": ("0.5", "0.25"), "max_body": ("5MiB", "6MiB"),
    "log_format": ("json", "text"), "otlp_traces_endpoint": ("http://a:4318/v1/traces", "https://b/v1/traces"),
    "max_grammar_size": ("2048", "4096"), "tool_call_parser": ("hermes", "mistral"), "reasoning_parser": ("think", "none"),
    "trusted_proxies": ("10.0.0.0/8,127.0.0.1", "::1"), "selection_options": ('{"sinks": 8}', '{"sinks": 4}'),
}  # fmt: skip


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch):
    for name in os.environ:
        if name.startswith(environment.PREFIX):
            monkeypatch.delenv(name)


def parse(*flags):
    config, options = cli.serve_settings(cli.parse(["serve", *flags]))
    sections = [getattr(config, field.name) for field in dataclasses.fields(config)]
    found = {name: getattr(part, name) for part in (*sections, options) for name in OPTIONS if hasattr(part, name)}
    keys = {f"{name}_file": (found[f"{name}_file"], found[name]) for name in ("api_key", "admin_key")}
    return found | keys  # a file with what was read in it


def samples(name, tmp_path):
    """Two values of a setting as texts."""
    option = OPTIONS[name]
    if name in SAMPLES:
        return SAMPLES[name]
    if name.endswith("_key_file"):
        files = tmp_path / "first", tmp_path / "second"
        for file in files:
            file.write_text(f"key-of-{name}-{file.name}\n")
        return tuple(map(str, files))
    if option.type is bool:
        return str(not option.default).lower(), str(option.default).lower()
    values = [value for value in allowed_values(option) if value != option.default]
    return (values[0], values[-1]) if values else ("33", "44")


@pytest.mark.parametrize("name", OPTIONS)
def test_every_setting_is_a_variable(name, tmp_path, monkeypatch):
    first, second = samples(name, tmp_path)
    flag = "--" + name.replace("_", "-")
    pair = {"ssl_certfile": ("--ssl-keyfile", "k.pem"), "ssl_keyfile": ("--ssl-certfile", "c.pem")}.get(name, ())

    def said(text):  # the same on the command line
        if name == "model":
            return (text,)
        return (flag if text == "true" else f"--no-{flag[2:]}",) if OPTIONS[name].type is bool else (flag, text, *pair)

    default, by_flag, by_other_flag = parse()[name], parse(*said(first))[name], parse(*said(second))[name]
    assert by_flag != by_other_flag and by_flag != default
    monkeypatch.setenv(f"KVLOOM_{name.upper()}", first)
    assert parse(*pair)[name] == by_flag
    assert parse(*said(second))[name] == by_other_flag  # a flag wins
    monkeypatch.setenv(f"KVLOOM_{name.upper()}", "")
    assert parse()[name] == default  # an empty one says nothing


def test_help_names_every_variable(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["serve", "--help"])
    shown = capsys.readouterr().out
    assert [name for name in OPTIONS if f"[$KVLOOM_{name.upper()}]" not in "".join(shown.split("\n")).replace(" ", "")] == []


def test_environment_over_file_and_file_over_default(tmp_path, monkeypatch):
    file = tmp_path / "kvloom.yaml"
    file.write_text("port: 1\nmax_body: 1MiB\n")
    monkeypatch.setenv("KVLOOM_CONFIG", str(file))
    monkeypatch.setenv("KVLOOM_PORT", "2")
    found = parse()
    assert (found["port"], found["max_body"]) == (2, 1 << 20)
    assert parse("--port", "3")["port"] == 3
    other = tmp_path / "other.yaml"
    other.write_text("max_body: 2MiB\n")
    assert parse("--config", str(other))["max_body"] == 2 << 20


@pytest.mark.parametrize("name, nearest", [("KVLOOM_MAX_NUM_SEQ", "KVLOOM_MAX_NUM_SEQS"), ("KVLOOM_APIKEY", "KVLOOM_API_KEY"),
                                           ("KVLOOM_XYZZY", "--help")])  # fmt: skip
def test_an_unknown_variable_is_an_error_that_names_the_nearest(name, nearest, monkeypatch):
    monkeypatch.setenv(name, "secret-value")
    with pytest.raises(ConfigError, match=name) as caught:
        parse()
    assert nearest in str(caught.value) and "secret-value" not in str(caught.value)


def test_what_kubernetes_sets_for_services_is_left_alone(monkeypatch):
    for name, text in {"KVLOOM_PORT": "tcp://10.0.0.1:8000", "KVLOOM_PORT_8000_TCP": "tcp://10.0.0.1:8000",
                       "KVLOOM_PORT_8000_TCP_PROTO": "tcp", "KVLOOM_SERVICE_HOST": "10.0.0.1", "KVLOOM_SERVICE_PORT": "8000",
                       "KVLOOM_SERVICE_PORT_HTTP": "8000", "KVLOOM_WEB_PORT": "tcp://10.0.0.2:80"}.items():  # fmt: skip
        monkeypatch.setenv(name, text)
    assert parse()["port"] == 8000


def test_other_variables_are_no_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path))
    assert parse()["port"] == 8000


@pytest.mark.parametrize("name, text, said", [
    ("KVLOOM_DRAFT", "maybe", "KVLOOM_DRAFT"), ("KVLOOM_PORT", "many", "'many'"), ("KVLOOM_PORT", "70000", "0 to 65535"),
])  # fmt: skip
def test_a_wrong_value_is_named(name, text, said, monkeypatch, capsys):
    monkeypatch.setenv(name, text)
    assert cli.main(["serve"]) == 2
    assert said in capsys.readouterr().err


def test_plan_reads_the_environment_too(monkeypatch, capsys):
    monkeypatch.setenv("KVLOOM_BLOCK_SIZE", "7")
    assert cli.main(["plan"]) == 2
    assert "block_size is 7" in capsys.readouterr().err


def test_keys_of_a_file_join_those_of_flags(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# team one\n key-one \r\n\n  # none\nkey,with,commas\n")
    assert parse("--api-key-file", str(file), "--api-key", "c")["api_key"] == ("c", "key-one", "key,with,commas")
    assert parse("--admin-key-file", str(file))["admin_key"] == ("key-one", "key,with,commas")


@pytest.mark.parametrize("content, said", [
    (b"", "holds no key"), (b"# only words\n\n", "holds no key"), (b"two words\n", "no header can carry"),
    ("schl\u00fcssel\n".encode(), "no header can carry"), (b"\xff\xfe", "it is no text"), (b"a\x00b\n", "no header can carry"),
    (b"k\n" * (1 << 19) + b"k", "is longer than"),
])  # fmt: skip
def test_a_wrong_key_file_is_refused_without_its_content(content, said, tmp_path):
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        parse("--api-key-file", str(file))
    assert str(file) in str(caught.value) and not any(word in str(caught.value) for word in ("two words", "schl", "only words"))


def test_a_key_file_that_cannot_be_read_is_refused(tmp_path):
    for path, said in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory"), ("a\0b", "cannot be read")):
        with pytest.raises(ConfigError, match=said):
            parse("--api-key-file", str(path))


def test_a_key_file_that_others_may_write_is_refused(tmp_path):
    file = tmp_path / "keys"
    file.write_text("key\n")
    file.chmod(file.stat().st_mode | stat.S_IWOTH)
    with pytest.raises(ConfigError, match="chmod o-w"):
        parse("--api-key-file", str(file))
    file.chmod(0o644)
    assert parse("--api-key-file", str(file))["api_key"] == ("key",)


def test_one_key_twice_is_one_tenant(tmp_path):
    file = tmp_path / "keys"
    file.write_text("same\n")
    _, options = cli.serve_settings(cli.parse(["serve", "--api-key-file", str(file), "--api-key", "same"]))
    assert not options.has_tenants
