"""YAML settings, read strictly: a key given twice in a mapping is an error, where the reader silently takes the last."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """The safe loader, without duplicates."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As the safe loader does it. Raises ConstructorError, with the line, for a key given twice."""
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, "a key is given twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


def load(text: str) -> Any:
    """What a YAML text holds. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # a safe loader


def told(error: yaml.YAMLError) -> str:
    """What is wrong with a text and in which line, without a word of it: it may hold keys and secrets."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "unreadable"
    line = f" (line {mark.line + 1})" if mark is not None else ""
    return f"{line}: " + re.sub(r" '[^'<][^']+'", "", problem)
