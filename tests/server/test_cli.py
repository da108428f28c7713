"""The command line: flags, YAML, their order, errors, help; and that it starts fast."""

import subprocess
import sys

import pytest

from kvloom import __version__
from kvloom.engine.config import EngineConfig, all_options
from kvloom.engine.errors import ConfigError
from kvloom.server import cli
from kvloom.server.options import ServerOptions, server_options

SECRET = "never-to-be-shown-4711"


def parse(*flags):
    return cli.serve_settings(cli.parse(["serve", *flags]))


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch):
    monkeypatch.delenv("KVLOOM_API_KEY", raising=False)


def test_defaults():
    config, options = parse()
    assert config.model.model == "smollm2" and options == ServerOptions()
    assert options.host == "127.0.0.1" and options.port == 8000


def test_flags():
    config, options = parse("some/model", "--port", "9", "--kv-memory", "4GiB", "--block-size", "32", "--dtype", "fp32",
                            "--api-key", "a", "--api-key", "b,c", "--cors", "*", "--max-body", "8MiB", "--drain-seconds", "2",
                            "--no-access-log", "--log-level", "warning", "--max-model-len", "512")  # fmt: skip
    assert (config.model.model, config.model.dtype, config.model.max_model_len) == ("some/model", "fp32", 512)
    assert (config.cache.kv_memory, config.cache.block_size) == (4 * 1024**3, 32)
    assert (options.port, options.api_key, options.cors) == (9, ("a", "b", "c"), ("*",))
    assert (options.max_body, options.drain_seconds, options.access_log, options.log_level) == (
        8 * 1024**2,
        2.0,
        False,
        "warning",
    )


def test_yaml_and_flags_win(tmp_path):
    file = tmp_path / "kvloom.yaml"
    file.write_text(
        "model: other\nport: 1234\nmax-num-seqs: 3\nkv_memory: 1GiB\napi_key: [x, y]\naccess_log: false\ndrain_seconds: 1\n"
    )
    config, options = parse("--config", str(file), "--port", "99")
    assert (config.model.model, config.scheduler.max_num_seqs, config.cache.kv_memory) == ("other", 3, 1024**3)
    assert (options.port, options.api_key, options.access_log, options.drain_seconds) == (99, ("x", "y"), False, 1.0)
    assert parse("mine", "--config", str(file))[0].model.model == "mine"


def test_key_from_the_environment(monkeypatch):
    monkeypatch.setenv("KVLOOM_API_KEY", "secret,other")
    assert parse()[1].api_key == ("secret", "other")
    assert parse("--api-key", "flag")[1].api_key == ("flag",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot: 1", "unknown setting 'prot'"),
        ("config: x", "unknown setting 'config'"),
        ("- a", "no mapping"),
        ("port: [", "not YAML"),
        ("port: eight", "port is 'eight'"),
        ("port: 99999", "0 to 65535"),
        ("access_log: 'yes'", "true or false"),
        ("api_key: [5]", "quote it"),
        ("block_size: 17", "power of two"),
        ("dtype: fp8", "dtype is 'fp8'"),
        ("ssl_keyfile: x", "go together"),
        ("max_body: 10", "1 KiB"),
        ("kv_memory: lots", "not a size"),
    ],
)
def test_bad_yaml_is_one_line_and_exit_code_2(tmp_path, capsys, content, message):
    file = tmp_path / "kvloom.yaml"
    file.write_text(content)
    assert cli.main(["serve", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("kvloom: ") and error.count("\n") == 1


@pytest.mark.parametrize("before", ["", "'", "@", "%", "*", "!", "x: ", "[", "a\nhash_secret: "])
def test_broken_yaml_is_not_quoted(tmp_path, capsys, before):
    file = tmp_path / "kvloom.yaml"
    file.write_text(f"hash_secret: {before}{SECRET}\n{'' if before else 'port: ['}")
    assert cli.main(["serve", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert "is not YAML (line " in error and SECRET not in error and error.count("\n") == 1


def test_absent_yaml(capsys):
    assert cli.main(["serve", "--config", "/nowhere.yaml"]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--prot", "1"], ["--por", "1"], ["a", "b"], ["--port"]])
def test_bad_flags_exit_with_2(capsys, flags):
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", *flags])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("kvloom serve: ") and error.count("\n") == 1


def test_a_misspelt_flag_gets_a_hint(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--prot", "1"])
    assert "unknown argument --prot (did you mean --port?)" in capsys.readouterr().err


def test_a_hint_names_a_flag_of_the_same_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--threads", "2"])  # a flag of serve
    assert "unknown argument --threads; see kvloom plan --help" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "x"], "port is 'x'; allowed: a whole number"),
        (["--threads", "-1"], "threads is -1; allowed: 1 to 1024"),
        (["--threads", "0"], "threads is 0; allowed: 1 to 1024"),
        (["--dtype", "fp8"], "bf16, fp16, fp32"),
        (["--api-key", "a,,b"], "empty key"),
    ],
)
def test_bad_values_are_one_line(capsys, flags, message):
    assert cli.main(["serve", *flags]) == 2
    assert message in capsys.readouterr().err


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for option in [*(option for _, option in all_options()), *server_options()]:
        shown = "MODEL" if option.name == "model" else "--" + option.name.replace("_", "-")
        assert shown in text and option.help.split(";")[0].split()[0] in text


def test_server_options_refuse_what_cannot_work():
    for values in ({"port": -1}, {"drain_seconds": -1.0}, {"api_key": ("ключ",)}, {"ssl_certfile": "x"}):
        with pytest.raises(ConfigError):
            ServerOptions(**values)


def test_models_list(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path))
    assert cli.main(["models", "list"]) == 0
    out = capsys.readouterr().out
    assert "smollm2" in out and "not fetched yet" in out and str(tmp_path) in out


def test_models_pull_of_an_unknown_name(capsys):
    assert cli.main(["models", "pull", "no-such-model"]) == 1
    assert "no model 'no-such-model'" in capsys.readouterr().err


def test_plan_takes_the_settings_of_serve(monkeypatch, capsys):
    planned = []
    monkeypatch.setattr("kvloom.server.plan_command.plan", lambda config, memory: planned.append((config, memory)) or 0)
    assert cli.main(["plan", "m", "--memory", "1GiB", "--dtype", "half", "--max-model-len", "64", "--block-size", "32"]) == 0
    assert cli.main(["plan", "--memory", "2GiB"]) == 0
    (config, memory), (default, _) = planned
    assert (config.model.model, config.model.dtype, config.model.max_model_len) == ("m", "fp16", 64)
    assert (memory, config.cache.block_size, default) == ("1GiB", 32, EngineConfig())
    for wrong in (["--block-size", "17"], ["--dtype", "fp8"], ["--max-model-len", "x"]):
        assert cli.main(["plan", "--memory", "1GiB", *wrong]) == 2
    assert "power of two" in capsys.readouterr().err


def test_version_needs_nothing_heavy():
    code = (
        "import sys\n"
        "from kvloom.server import cli\n"
        "try: cli.main(['--version'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'fastapi', 'uvicorn', 'yaml', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"kvloom {__version__}\n"


def test_the_server_itself_needs_no_torch():
    code = "import sys, kvloom.server.serve; assert not {'torch', 'numba', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("words", [["bench", "engine"], ["bench", "peers"], ["eval", "weights"]])
def test_measurements_read_their_own_flags(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--help"])
    assert ended.value.code == 0
    assert f"usage: kvloom {' '.join(words)}" in capsys.readouterr().out


def test_measurements_are_listed_and_an_unknown_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "nothing"])
    assert ended.value.code == 2
    assert "engine" in capsys.readouterr().err


def test_bare_kvloom_prints_help(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 0 and "serve a model" in capsys.readouterr().out


def test_other_servers_names_are_taken():
    config, options = parse("m", "--max-num-batched-tokens", "256", "--max-num-batched-tokens=512", "--dtype", "bfloat16",
                            "--tensor-parallel-size", "1", "--pipeline-parallel-size=1", "--no-enable-prefix-caching",
                            "--enable-chunked-prefill", "--enforce-eager", "--kv-cache-memory-bytes", "1GiB",
                            "--scheduling-policy", "priority", "--disable-log-requests")  # fmt: skip
    assert (config.scheduler.max_batched_tokens, config.model.dtype, config.cache.reuse) == (512, "bf16", "off")
    assert (config.cache.kv_memory, config.scheduler.scheduler, options.access_log) == (1 << 30, "priority", False)


@pytest.mark.parametrize(("words", "names"), [
    (["m", "--served-model-name", "a", "b", "--port", "1"], ("a", "b")), (["m", "--served-model-name", "a,b"], ("a", "b")),
    (["m", "--served-model-name", "a", "--served-model-name", "b"], ("a", "b")), (["m", "--served-model-name=a"], ("a",)),
    (["--served-model-name", "a", "m"], ("a",)), (["m", "--alias", "a", "b"], ("a", "b")), (["m"], ()),
])  # fmt: skip
def test_names_of_the_model(words, names):
    """Behind the model, all words are names, as in vLLM; before it, one is."""
    config, _ = parse(*words)
    assert config.model.served_model_name == names and config.model.model == "m"


def test_a_name_is_needed(capsys):
    with pytest.raises(SystemExit):
        parse("m", "--served-model-name")
    assert "expected one argument" in capsys.readouterr().err


def test_other_servers_names_in_yaml(tmp_path):
    file = tmp_path / "kvloom.yaml"
    file.write_text(
        "max-num-batched-tokens: 64\ntensor_parallel_size: 1\nenable_prefix_caching: false\nenforce-eager: true\n"
        "disable-log-requests: true\ndtype: half\n"
    )
    config, options = parse("--config", str(file))
    assert (config.scheduler.max_batched_tokens, config.cache.reuse, config.model.dtype) == (64, "off", "fp16")
    assert options.access_log is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size is '2'; allowed: 1, as kvloom runs on one machine"),
        (["--tensor-parallel-size=2"], "is '2'; allowed: 1"),
        (["--tensor-parallel-size"], "is ''; allowed: 1"),
        (["--kv-cache-dtype", "fp8"], "allowed: auto or bfloat16, as KV is stored in --dtype"),
        (["--enable-chunked-prefill=yes"], "allowed: no value"),
    ],
)
def test_what_cannot_be_had_here_is_refused_with_the_reason(capsys, flags, message):
    assert cli.main(["serve", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_misspelt_flag_of_another_server_gets_a_hint(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--tensor-paralel-size", "1"])
    assert "did you mean --tensor-parallel-size?" in capsys.readouterr().err


def test_help_shows_units_choices_and_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "VALUE" not in text
    for shown in ("--kv-memory SIZE", "--max-model-len TOKENS", "--weights {auto,bf16,int8,int4}", "--host ADDRESS",
                  "--tenants FILE", "--selection-options JSON", "(default: 1024)", "--drain-seconds SECONDS"):  # fmt: skip
        assert shown in text
