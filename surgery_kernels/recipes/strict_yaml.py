"""YAML in which a key that is written twice is an error."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """PyYAML's own keeps the last of equal keys without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        marks: dict[tuple[str, Any], yaml.Mark] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            first = marks.setdefault((key.tag, key.value), key.start_mark)
            if first is not key.start_mark:
                problem = f"the key {key.value!r} of line {first.line + 1} again"
                raise yaml.composer.ComposerError(problem=problem, problem_mark=key.start_mark)
        return node


def load_yaml(text: str, name: str) -> Any:
    """What a YAML document holds.

    Args:
        text: One document.
        name: Of the document, for errors.

    Raises:
        ValueError: it is not YAML, or a mapping has a key twice; names the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = (error.problem or "").removeprefix("but ")
        raise ValueError(f"{name} must be valid YAML, got an error in line {line}: {problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a control character, a month 13, lists without end
        raise ValueError(f"{name} must be valid YAML, got {' '.join(str(error).split())}") from None
