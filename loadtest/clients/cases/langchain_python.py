"""langchain-openai."""

from langchain_cases import cases
from report import run

run(cases())
