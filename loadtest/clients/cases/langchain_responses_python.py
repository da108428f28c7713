"""langchain-openai on responses."""

from langchain_cases import cases
from report import run

whole = cases(use_responses_api=True)
by_id = cases(use_responses_api=True, use_previous_response_id=True)


def tools():
    """A loop, with all items sent again, and by the id of the response before."""
    whole["tools"]()
    by_id["tools"]()


run({**whole, "tools": tools})
