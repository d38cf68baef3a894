"""Strict YAML 1.2 without duplicate keys, where strings are taken literally."""

import os
import re
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from .errors import ConfigError, one_line

MAX_ALIASES = 100


# Unquoted words that disable a setting.
OFF = {"", "~", "null", "none", "off", "no", "false"}


class _Loader(yaml.SafeLoader):
    """SafeLoader that rejects duplicate keys and aliases that refer to aliases.

    Numbers and booleans follow YAML 1.2, unlike in SafeLoader: 1e-3 is a number and off is a
    string.
    """

    _aliases = 0
    _within_anchors = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        is_alias = isinstance(event, yaml.AliasEvent)
        self._aliases += is_alias
        # A few nested aliases can expand to billions of values, or to themselves.
        if is_alias and (self._within_anchors or self._aliases > MAX_ALIASES):
            raise yaml.MarkedYAMLError(
                problem=f"alias '*{event.anchor}' within an anchor, or over {MAX_ALIASES} aliases",
                problem_mark=event.start_mark,
            )
        anchors = int(not is_alias and event.anchor is not None)
        self._within_anchors += anchors
        node = super().compose_node(parent, index)
        self._within_anchors -= anchors
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.MarkedYAMLError(
                        problem=f"duplicate key '{key.value}'", problem_mark=key.start_mark
                    )
                keys.add(key.value)
        return node


_CORE_SCALARS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    # Leading zeros, underscores and colons are excluded: in YAML 1.1, 010 is 8 and 1:30 is 90.
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _CORE_SCALARS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, (_pattern, _first) in _CORE_SCALARS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^({_pattern})$"), list(_first))


def accepts(annotation: Any, kind: type) -> bool:
    """Return whether an annotation accepts values of a type; literals count as str."""
    is_choice = get_origin(annotation) in (UnionType, Union, Literal)
    kinds = get_args(annotation) if is_choice else (annotation,)
    return any(one is kind or (kind is str and isinstance(one, str)) for one in kinds)


def _retag(node: yaml.Node | None, annotation: Any) -> yaml.Node | None:
    """Tag scalars as strings where the setting is a string, and as null where it is disabled.

    Without this, YAML would read the folder 2024-11-28 as a date and the folder 1e3 as a number.

    Args:
        node: Composed YAML, which is not modified, as aliases share nodes.
        annotation: Type of the setting or section that the node describes.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not isinstance(node, yaml.MappingNode):
            return node
        pairs = []
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                pairs.append((key, _retag(value, annotation)))
            else:
                field = annotation.model_fields.get(key.value) if key.id == "scalar" else None
                pairs.append((key, _retag(value, field.annotation) if field else value))
        return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark, node.flow_style)
    if not isinstance(node, yaml.ScalarNode) or node.style is not None:
        return node
    tag = node.tag
    if accepts(annotation, NoneType) and node.value.lower() in OFF:
        tag = "tag:yaml.org,2002:null"
    elif accepts(annotation, str):
        tag = "tag:yaml.org,2002:str"
    return yaml.ScalarNode(tag, node.value, node.start_mark, node.end_mark)


def load_yaml(text: str | bytes, name: str | os.PathLike, annotation: Any = None) -> Any:
    """Parse YAML strictly.

    Args:
        text: YAML source; bytes are UTF-8.
        name: Name of the source in error messages.
        annotation: Section or type of the setting; string settings take scalars literally.

    Returns:
        Parsed contents; None if there are none.

    Raises:
        ConfigError: If the source is not valid YAML, repeats a key or nests aliases.
    """
    try:
        loader = _Loader(text)
        try:
            node = _retag(loader.get_single_node(), annotation)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{name} is not valid YAML: {error.problem}{line}") from error
    except RecursionError as error:
        raise ConfigError(f"{name} is not valid YAML: too deeply nested") from error
    except Exception as error:  # value constructors raise errors of any type
        raise ConfigError(f"{name} is not valid YAML: {one_line(error)}") from error
