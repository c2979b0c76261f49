"""Write the parts of the pages that come from the code.

A generated part stands between the lines ``<!-- generated: NAME -->`` and ``<!-- end -->`` of a page; the
rest of the page is written by hand.

    python docs/generate.py            rewrite the pages
    python docs/generate.py --check    exit 1 and name the pages that are not up to date
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

DOCS = Path(__file__).resolve().parent
REFERENCE = DOCS / "reference"
MEANINGS: dict[str, dict[str, Any]] = yaml.safe_load((REFERENCE / "meanings.yaml").read_text("utf-8"))
_PART = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_ALL_CORES = 2**31 - 1


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in lines)


def _cell(text: str) -> str:
    """Keep bars out of the table's own, and angle brackets from being read as HTML."""
    text = text.replace("|", "\\|")
    return text if "`" in text else text.replace("<", "\\<")


def command_line() -> str:
    """Return a section for every command that a person types, with its arguments and options."""
    return "\n\n".join(_section(name, item) for name, item in _commands() if not name.startswith("stage"))


def stage_commands() -> str:
    """Return one line for every step of the workflow."""
    rows = [
        (f"`{name}`", _first_paragraph(item.help), f"`{' '.join(_usage(item))}`")
        for name, item in _commands()
        if name.startswith("stage")
    ]
    return table(("step", "what it does", "arguments"), rows)


def _commands() -> Iterator[tuple[str, Any]]:
    import typer

    # Defaults that are the number of cores must not name this machine's.
    with patch.object(os, "cpu_count", lambda: _ALL_CORES):
        from driftscope.cli import app

    def walk(prefix: str, group: Any) -> Iterator[tuple[str, Any]]:
        for name, item in group.commands.items():
            if hasattr(item, "commands"):
                yield from walk(f"{prefix}{name} ", item)
            elif not item.hidden:
                yield f"{prefix}{name}", item

    return walk("", typer.main.get_command(app))


def _section(name: str, item: Any) -> str:
    usage = " ".join(["driftscope", name, *_usage(item)])
    rows = [
        (_parameter(parameter), _default(parameter), parameter.help or MEANINGS["arguments"][parameter.name])
        for parameter in item.params
        if parameter.name != "help"
    ]
    parts = [f"### driftscope {name}", _first_paragraph(item.help), f"```\n{usage}\n```"]
    if rows:
        parts.append(table(("argument", "default", "meaning"), rows))
    return "\n\n".join(parts)


def _usage(item: Any) -> list[str]:
    words = []
    for parameter in item.params:
        several = "..." if parameter.nargs == -1 or getattr(parameter, "multiple", False) else ""
        if parameter.param_type_name == "argument":
            word = f"{parameter.name.upper()}{several}"
        elif getattr(parameter, "is_flag", False):
            word = max(parameter.opts, key=len)
        else:
            word = f"{max(parameter.opts, key=len)} {_value_name(parameter)}{several}"
        words.append(word if parameter.required else f"[{word}]")
    return words


def _value_name(parameter: Any) -> str:
    return str(max(parameter.opts, key=len).lstrip("-").replace("-", "_").upper())


def _parameter(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`"
    return ", ".join(f"`{option}`" for option in sorted(parameter.opts, key=len, reverse=True))


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    if isinstance(value, bool) or not isinstance(value, (int, float, str, Path)):
        return ""
    return "all cores" if value == _ALL_CORES else f"`{value}`"


def _first_paragraph(text: str | None) -> str:
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def evidence_tables() -> str:
    """Return every table of the evidence with its columns.

    Raises:
        ValueError: `meanings.yaml` and the schemas do not name the same columns.
    """
    from driftscope.evidence.schemas import COLUMNS, SCHEMAS

    parts = []
    for name, columns in COLUMNS.items():
        meanings = MEANINGS["tables"].get(name, {})
        odd = sorted(set(columns) ^ set(meanings.get("columns", {})))
        if odd:
            raise ValueError(
                f"docs/reference/meanings.yaml: table {name}: explain exactly its columns: {odd}"
            )
        schema = SCHEMAS[name]
        rows = [
            (f"`{column}`", str(dtype), _limits(schema.columns[column]), meanings["columns"][column])
            for column, dtype in columns.items()
        ]
        key = ", ".join(f"`{column}`" for column in schema.unique or [])
        parts += [f"### {name}", f"{meanings['what']} One row for each {key}."]
        parts.append(table(("column", "dtype", "values", "meaning"), rows))
    return "\n\n".join(parts)


def _limits(column: Any) -> str:
    found = []
    for check in column.checks:
        statistics = check.statistics or {}
        if "allowed_values" in statistics:
            found.append(", ".join(f"`{value}`" for value in statistics["allowed_values"]))
        elif "min_value" in statistics:
            found.append(f"≥ {statistics['min_value']:g}")
    return "; ".join([*found, *(["may be null"] if column.nullable else [])])


def code_packages() -> str:
    """Return the packages whose code a stage's evidence depends on."""
    from driftscope.evidence.digest import STAGE_PACKAGES

    rows = [
        (f"`{stage}`", ", ".join(f"`{name}`" for name in names)) for stage, names in STAGE_PACKAGES.items()
    ]
    return table(("stage", "packages in the digest"), rows)


def configuration() -> str:
    """Return the keys of every section of the configuration.

    Raises:
        ValueError: a key has neither a description in the code nor one in `meanings.yaml`.
    """
    from driftscope.config import config_json_schema

    schema = config_json_schema()
    parts = []
    for name, section in {
        "Config": schema,
        **{name: schema["$defs"][name] for name in _order(schema)},
    }.items():
        rows = [
            (
                f"`{key}`",
                _kind(spec),
                _default_value(name, key),
                spec.get("description") or MEANINGS["configuration"].get(name, {}).get(key, ""),
            )
            for key, spec in section["properties"].items()
        ]
        unexplained = [key for key, *_, meaning in rows if not meaning]
        if unexplained:
            raise ValueError(f"docs/reference/meanings.yaml: configuration {name}: explain {unexplained}")
        parts += [f"### {_title(name)}", " ".join(section["description"].split())]
        parts.append(table(("key", "type", "default", "meaning"), rows))
    return "\n\n".join(parts)


def _order(schema: dict[str, Any]) -> list[str]:
    """Sections in the order in which the configuration names them."""
    found: list[str] = []

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            target = str(node.get("$ref", "")).removeprefix("#/$defs/")
            if target and target not in found:
                found.append(target)
                visit(schema["$defs"][target])
            for value in node.values():
                visit(value)
        elif isinstance(node, list):
            for value in node:
                visit(value)

    visit(schema["properties"])
    return found


def _title(name: str) -> str:
    """What a section is called."""
    return str(MEANINGS["configuration"][name]["called"])


def _kind(spec: dict[str, Any]) -> str:
    if "$ref" in spec:
        title = _title(spec["$ref"].removeprefix("#/$defs/"))
        return f"[{title}](#{title})"
    if "anyOf" in spec:
        return _kind(next(item for item in spec["anyOf"] if item.get("type") != "null"))
    if "enum" in spec:
        return ", ".join(f"`{value}`" for value in spec["enum"])
    if "const" in spec:
        return f"`{spec['const']}`"
    if spec.get("type") == "array":
        if "prefixItems" in spec:
            return ", ".join(_kind(item) for item in spec["prefixItems"])
        return f"list of {_kind(spec.get('items', {}))}"
    if spec.get("type") == "object":
        values = spec.get("additionalProperties") or next(
            iter(spec.get("patternProperties", {}).values()), {}
        )
        return f"name to {_kind(values)}"
    plain = {"string": "text", "boolean": "true or false"}
    limits = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    words = [f"{sign} {spec[key]}" for key, sign in limits if key in spec]
    return ", ".join([plain.get(spec.get("type", ""), str(spec.get("type", "any"))), *words])


def _default_value(section: str, key: str) -> str:
    from driftscope import config

    fields = getattr(config, section).model_fields.values()
    names = getattr(config, section).model_fields
    field = next(info for name, info in zip(names, fields, strict=True) if key in (name, info.alias))
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value in (None, ""):
        return ""
    if hasattr(value, "model_dump"):
        return "its defaults"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def taps() -> str:
    """Return the taps of a pass in topological order, with what each holds."""
    from driftscope.artifacts.model import ModelConfig
    from driftscope.forward import architecture

    sizes = dict.fromkeys(("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"), 1)
    sizes |= dict.fromkeys(("intermediate_size", "vocab_size", "context_length"), 1)
    config = ModelConfig("llama", **sizes, rms_norm_eps=1e-5, rope_theta=1e4)
    whole = [architecture.embedding_op(config), *architecture.head_ops(config)]
    rows = [
        (f"`{op.tap}`", ", ".join(f"`{site}`" for site in op.sites), op.capture_point)
        for op in (whole[0], *architecture.layer_ops(config), *whole[1:])
    ]
    return table(("tap", "weights", "capture point in a llama"), rows)


def weight_formats() -> str:
    """Return the storage formats of weights, with the activation format that ggml pairs with each."""
    from driftscope.kernels.formats import FORMATS

    offset = {"none": "", "subtract": "minimum a sub-block, subtracted", "add": "minimum a block, added"}
    rows = [
        (
            f"`{item.name}`",
            f"{item.block_size} in {item.block_bytes} bytes",
            str(item.sub_block or ""),
            offset[item.offset],
            f"`{item.activation}`" if item.native else "",
        )
        for item in FORMATS.values()
        if item.native
    ]
    other = ", ".join(f"`{item.name}`" for item in FORMATS.values() if not item.native)
    head = ("format", "values in a block", "values a scale", "offset", "activation")
    return f"{table(head, rows)}\n\nRead through the gguf package: {other}."


def architectures() -> str:
    """Return the architectures that are read and written, and what their files store otherwise."""
    from driftscope.artifacts.config import SUPPORTED
    from driftscope.artifacts.names import GGUF_ARCHITECTURES
    from driftscope.artifacts.transforms import GGUF, HUGGING_FACE, Table

    def said(of: Table) -> str:
        by_label: dict[str, list[str]] = {}
        for pattern, transforms in of.items():
            for transform in transforms:
                by_label.setdefault(transform.label, []).append(f"`{pattern}`")
        return "; ".join(f"{label}: {', '.join(names)}" for label, names in by_label.items())

    rows = [
        (
            f"`{name}`",
            f"`{GGUF_ARCHITECTURES[name]}`",
            said(GGUF[GGUF_ARCHITECTURES[name]]),
            said(HUGGING_FACE.get(name, {})),
        )
        for name in SUPPORTED
    ]
    return table(
        ("`model_type`", "GGUF", "what GGUF stores otherwise", "what a folder stores otherwise"), rows
    )


def transforms() -> str:
    """Return what may lie between stored bytes and canonical values, with what each is."""
    from driftscope.artifacts.transforms import LABELS

    rows = [(f"`{label}`", _first_paragraph(inspect.getdoc(kind))) for label, kind in LABELS.items()]
    return table(("name", "meaning"), rows)


PARTS: dict[str, Callable[[], str]] = {
    "command-line": command_line,
    "stage-commands": stage_commands,
    "evidence-tables": evidence_tables,
    "taps": taps,
    "code-packages": code_packages,
    "configuration": configuration,
    "weight-formats": weight_formats,
    "architectures": architectures,
    "transforms": transforms,
}


def render(page: str) -> str:
    """Return a page with its generated parts written anew."""
    return _PART.sub(lambda match: f"{match[1]}\n{PARTS[match[2]]()}\n\n{match[3]}", page)


def schemas() -> dict[Path, str]:
    """Return the JSON Schemas that editors and other programs read, by file."""
    from driftscope.config import config_json_schema
    from driftscope.contracts.model import contract_json_schema

    folder = DOCS.parent / "workflow" / "schemas"
    documents = {"config": config_json_schema(), "contract": contract_json_schema()}
    return {
        folder / f"{name}.schema.json": json.dumps(document, indent=1) + "\n"
        for name, document in documents.items()
    }


def main() -> int:
    """Rewrite the pages and schemas, or check them."""
    parser = argparse.ArgumentParser(description="write the generated parts of the pages, and the schemas")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if a page is not up to date"
    )
    check = parser.parse_args().check
    stale = []
    pages = {path: render(path.read_text("utf-8")) for path in sorted(DOCS.rglob("*.md"))}
    for path, after in {**pages, **schemas()}.items():
        before = path.read_text("utf-8") if path.is_file() else ""
        if after != before:
            stale.append(path.relative_to(DOCS.parent).as_posix())
            if not check:
                path.write_text(after, "utf-8")
    for path_name in stale:
        print(f"{path_name}: {'not up to date; run python docs/generate.py' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
