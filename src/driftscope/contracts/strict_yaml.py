"""YAML as data only: no tags, no aliases, no repeated keys; and where in the file each value stands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from driftscope.errors import InputError

MAXIMUM_BYTES = 4 * 1024 * 1024

_MAP, _SEQUENCE = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class YamlDocument:
    """The plain values of a YAML file, and the line (from 1) of every key and list item."""

    file: Path
    values: dict[str, Any]
    lines: dict[Location, int]

    def line(self, location: Location) -> int:
        """Return the line of a value, or of the nearest value around it that is in the file."""
        for length in range(len(location), 0, -1):
            if location[:length] in self.lines:
                return self.lines[location[:length]]
        return 1


# libyaml where PyYAML was built with it, five times as fast; its recursion is not Python's, which would end
# in an error, so that the depth is looked at first.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_OPENING = (
    *(yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken),
    *(yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken),
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)
_DEEPEST = 64


def load_yaml(path: Path) -> YamlDocument:
    """Read one YAML mapping.

    Raises:
        InputError: the file is missing, too large, not UTF-8, not one YAML mapping, uses aliases, or has
            a key twice; with file and line.
    """
    try:
        if path.stat().st_size > MAXIMUM_BYTES:
            raise InputError(f"{path}: is larger than {MAXIMUM_BYTES} bytes; expected a contract")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; expected a contract (YAML)") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path) -> YamlDocument:
    """Parse the text of one YAML mapping; `path` names it in messages."""
    lines: dict[Location, int] = {}
    try:
        depth = 0
        for token in yaml.scan(text, Loader=_LOADER):
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if isinstance(token, yaml.AliasToken):
                raise InputError(
                    f"{path}:{token.start_mark.line + 1}: uses an alias (*{token.value}); write it out"
                )
            if depth > _DEEPEST:
                raise InputError(f"{path}: is nested too deeply")
        node = yaml.compose(text, Loader=_LOADER)
        if not isinstance(node, MappingNode):
            raise InputError(f"{path}: is not a mapping of keys; expected a contract")
        values = _plain(node, (), lines, path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"{where}: is not valid YAML: {problem}") from error
    except RecursionError as error:
        raise InputError(f"{path}: is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{path}: holds a value that is not valid YAML: {error}") from error
    return YamlDocument(path, values, lines)


def _plain(node: Node, where: Location, lines: dict[Location, int], path: Path) -> Any:
    lines.setdefault(where, node.start_mark.line + 1)
    if isinstance(node, MappingNode) and node.tag == _MAP:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                raise InputError(f"{path}:{line}: a key must be plain text")
            key = key_node.value
            if key in mapping:
                raise InputError(f"{path}:{line}: key `{key}` is there twice")
            lines[(*where, key)] = line
            mapping[key] = _plain(value_node, (*where, key), lines, path)
        return mapping
    if isinstance(node, SequenceNode) and node.tag == _SEQUENCE:
        return [_plain(item, (*where, index), lines, path) for index, item in enumerate(node.value)]
    return _scalar(node, path)


def _scalar(node: Node, path: Path) -> Any:
    value = yaml.SafeLoader("").construct_document(node) if isinstance(node, ScalarNode) else node
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{path}:{node.start_mark.line + 1}: {node.value} is not a finite number")
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if node.tag == "tag:yaml.org,2002:timestamp":
        return node.value
    raise InputError(f"{path}:{node.start_mark.line + 1}: a value of type {node.tag} is not allowed")
