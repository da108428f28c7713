"""What the terminal shows once the server listens."""

import asyncio
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from kvloom.engine.requests.sampling import SamplingDefaults
from kvloom.server.console import LoadingBars, banner, base_url, curl_line
from kvloom.server.options import ServerOptions


def show(engine, options):
    banner(engine.model, asyncio.run(engine.stats()), options, 80)


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1:80"), ("0.0.0.0", "http://127.0.0.1:80"), ("::1", "http://[::1]:80")]
)
def test_banner(fake, capsys, host, url):
    show(fake.FakeEngine(), ServerOptions(host=host))
    text = capsys.readouterr().err
    assert f"echo-model at {url}\n" in text and "1600 tokens in blocks of 16" in text
    assert "3 MiB for selection methods" in text
    assert ("set --api-key" in text) == (host == "0.0.0.0")
    command = shlex.split(text[text.index("curl") :].strip())
    assert command[1] == f"{url}/v1/chat/completions" and json.loads(command[-1])["model"] == "echo-model"


def test_banner_names_the_library_that_attends(fake, capsys):
    engine = fake.FakeEngine()
    engine.model = replace(engine.model, attention="flashinfer 0.7.4")
    show(engine, ServerOptions())
    assert "fake kernels and flashinfer 0.7.4 on cpu" in capsys.readouterr().err


def test_banner_says_which_loops_the_kernels_take(fake, capsys):
    engine = fake.FakeEngine()
    show(engine, ServerOptions())
    assert "  kernels  " not in capsys.readouterr().err
    engine.model = replace(engine.model, paths="linear layers: VNNI; attention over bf16: bf16 pairs")
    show(engine, ServerOptions())
    assert "  kernels   linear layers: VNNI; attention over bf16: bf16 pairs\n" in capsys.readouterr().err


def test_banner_shows_no_key(fake, capsys):
    show(fake.FakeEngine(), ServerOptions(host="0.0.0.0", api_key=("hidden",)))
    text = capsys.readouterr().err
    assert "hidden" not in text and "Authorization: Bearer YOUR_KEY" in text and "set --api-key" not in text


def test_stages_are_lines_where_there_is_no_terminal(capsys):
    with LoadingBars() as progress:
        for done in range(3):
            progress("downloading", done, 0)
            progress("loading", done, 2)
    assert capsys.readouterr().err == "downloading ...\nloading ...\n"


def test_banner_names_what_is_not_the_default(fake, capsys):
    engine = fake.FakeEngine()
    show(engine, ServerOptions())
    assert "settings" not in capsys.readouterr().err
    engine.model = replace(engine.model, settings={"selection": "tidal_decode", "max_num_seqs": 4})
    show(engine, ServerOptions())
    assert "  settings  --selection tidal_decode --max-num-seqs 4\n" in capsys.readouterr().err


def test_banner_says_what_requests_are_sampled_with_and_who_says_so(fake, capsys):
    engine = fake.FakeEngine()
    show(engine, ServerOptions())
    assert "  sampling  temperature 1, top_p 1 (OpenAI's defaults)\n" in capsys.readouterr().err
    engine.model = replace(engine.model, sampling_source="generation_config.json", settings={"chat_template": "{{ x }}" * 99},
                           sampling=SamplingDefaults(temperature=0.6, top_k=20, max_tokens=2048))  # fmt: skip
    show(engine, ServerOptions())
    text = capsys.readouterr().err
    assert "  sampling  temperature 0.6, top_p 1, top_k 20, max_tokens 2048 (generation_config.json)\n" in text
    assert "--chat-template {{ x }}" in text and len(max(text.splitlines(), key=len)) < 200


def test_readme_asks_what_the_server_says_to_ask():
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    assert "\n$ " + curl_line(ServerOptions(), base_url(ServerOptions(), 8000), "smollm2") + "\n" in readme


def test_banner_says_which_device_was_chosen(fake, capsys):
    engine = fake.FakeEngine()
    show(engine, ServerOptions())
    assert "  device " not in capsys.readouterr().err
    engine.model = replace(engine.model, device="cuda", device_note="H200, compute capability 9.0")
    show(engine, ServerOptions())
    assert "  device    cuda: H200, compute capability 9.0\n" in capsys.readouterr().err
