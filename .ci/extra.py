"""Prints the requirements of one extra of pyproject.toml, one a line."""

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pip carries the same reader
    from pip._vendor import tomli as tomllib

PROJECT = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(extra: str) -> list[str]:
    expanded: list[str] = []
    for requirement in PROJECT["optional-dependencies"][extra]:
        if requirement.startswith(f"{PROJECT['name']}["):
            expanded += requirements(requirement.partition("[")[2].rstrip("]"))
        else:
            expanded.append(requirement)
    return expanded


print("\n".join(requirements(sys.argv[1])))
