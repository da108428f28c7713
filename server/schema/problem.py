"""A validation error that names the field it is about, for rules that concern more than one field."""

from pydantic_core import PydanticCustomError

KIND = "field_problem"


def problem(param: str, message: str) -> PydanticCustomError:
    """To raise inside a pydantic validator; `param` is relative to the model that is validated."""
    return PydanticCustomError(KIND, "{message}", {"message": message, "param": param})
