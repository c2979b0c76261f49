"""What ``driftscope inspect`` shows on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from driftscope.cli.show import plain
from driftscope.report.text import count, counted, percent, size

_BAR = 24
_TEMPLATE_LINES = 6
_SYSTEM = {
    "used": "takes a system message",
    "added": "takes a system message, and adds one of its own where there is none",
    "ignored": "ignores a system message",
    "refused": "refuses a system message",
    "unknown": "could not be rendered",
}


def print_overview(document: Mapping[str, Any]) -> None:
    """Print what a model says of itself."""
    from rich.console import Console

    console = Console(highlight=False)

    def line(text: str = "", style: str = "") -> None:
        console.print(plain(text), markup=False, style=style, soft_wrap=True)

    line(f"{document['path']}")
    line(
        f"{document['architecture']}, {count(document['parameters'])} parameters in "
        f"{counted(document['tensors'], 'tensor')}, {size(document['bytes'])}, {document['container']}"
    )
    line()
    line("formats by size", "bold")
    for name, item in document["dtypes"].items():
        filled = round(item["share"] * _BAR)
        bar = "█" * filled + "·" * (_BAR - filled)
        line(
            f"  {name:<8} {bar} {percent(item['share']):>7} {size(item['bytes']):>9}  "
            f"{counted(item['tensors'], 'tensor')}"
        )
    line()
    line("hyperparameters", "bold")
    for key, value in document["config"].items():
        if value not in (None, False, 0.0) or key == "tie_word_embeddings":
            line(f"  {key:<22} {_value(value)}")
    line()
    _print_tokenizer(document, line)
    line()
    _print_oddities(document["oddities"], line)
    for name in document["unmapped"][:5]:
        line(f"  unmapped: {name}")
    if len(document["unmapped"]) > 5:
        line(f"  unmapped: and {len(document['unmapped']) - 5} more")


def _print_tokenizer(document: Mapping[str, Any], line: Any) -> None:
    tokenizer = document["tokenizer"]
    line("tokenizer", "bold")
    kind = tokenizer["kind"] or "none"
    pre = f", pre-tokenizer {tokenizer['pre']}" if tokenizer["pre"] else ""
    line(f"  {kind}{pre}, {counted(tokenizer['tokens'], 'token')}")
    if tokenizer["problem"]:
        line(f"  {tokenizer['problem']}", "yellow")
    for name, item in tokenizer["special"].items():
        line(f"  {name:<22} {item['id']} {item['text']!r}")
    for key in ("add_bos", "add_eos"):
        if tokenizer[key] is not None:
            line(f"  {key:<22} {_value(tokenizer[key])}")
    line()
    template = document["chat_template"]
    line("chat template", "bold")
    if template is None:
        line("  none")
        return
    line(
        f"  {counted(template['lines'], 'line')}, {counted(template['characters'], 'character')}; "
        f"{_SYSTEM[template['system']]}"
    )
    if template["problem"] and template["system"] == "unknown":
        line(f"  {template['problem']}", "yellow")
    prompt = template["rendered"]["system"] or template["rendered"]["user"]
    if prompt is not None:
        lines = prompt.splitlines()
        for text in lines[:_TEMPLATE_LINES]:
            line(f"  │ {text[:100]}", "dim")
        if len(lines) > _TEMPLATE_LINES:
            line(f"  │ … and {counted(len(lines) - _TEMPLATE_LINES, 'line')} more", "dim")


def _print_oddities(found: list[Mapping[str, Any]], line: Any) -> None:
    if not found:
        line("✓ nothing odd about the metadata", "green")
        return
    line("odd", "bold")
    for item in found:
        mark, style = ("!", "yellow") if item["severity"] == "warning" else ("·", "")
        line(f"{mark} {item['where']}: {item['what']}", style)
        line(f"    {item['why']}", "dim")


def print_comparison(found: Mapping[str, Any]) -> None:
    """Print in what the metadata of two models differ."""
    from rich.console import Console

    console = Console(highlight=False)

    def line(text: str = "", style: str = "") -> None:
        console.print(plain(text), markup=False, style=style, soft_wrap=True)

    line(f"A {found['a']}")
    line(f"B {found['b']}")
    for title in ("hyperparameters", "tokenizer", "special"):
        if found[title]:
            line()
            line("special tokens" if title == "special" else title, "bold")
            for item in found[title]:
                changes = f"  ({item['changes'].replace('-', ' ')})" if "changes" in item else ""
                line(f"  {item['key']:<22} {_value(item['a'])} → {_value(item['b'])}{changes}")
    tokens = found["tokens"]
    if tokens is not None and tokens["differing"]:
        line()
        line("tokens", "bold")
        line(f"  {tokens['differing']} differ, of {tokens['count_a']} and {tokens['count_b']}")
        for item in tokens["first"][:5]:
            line(f"  {item['id']:<22} {item['a']!r} → {item['b']!r}")
    template = found["template"]
    if template is not None and not template["equal"]:
        line()
        line("chat template", "bold")
        for text in template["diff"]:
            style = {"+": "green", "-": "red", "@": "dim"}.get(text[:1], "")
            line(f"  {text}", style)
    _print_keys(found["keys"], line)
    line()
    if found["same"]:
        line("✓ The same metadata, but for labels.", "bold green")
    else:
        parts = [
            counted(len(found[key]), name)
            for key, name in (
                ("hyperparameters", "hyperparameter"),
                ("tokenizer", "property of the tokenizer"),
            )
            if found[key]
        ]
        special = sum(bool(item["a"] and item["b"]) for item in found["special"])
        parts += [counted(special, "special token")] if special else []
        parts += [counted(tokens["differing"], "token")] if tokens and tokens["differing"] else []
        parts += ["the chat template"] if template and not template["equal"] else []
        line(f"✗ The metadata differ: {', '.join(parts)}.", "bold red")


def _print_keys(keys: Mapping[str, Any] | None, line: Any) -> None:
    if keys is None or not any(keys.values()):
        return
    line()
    line("raw keys", "bold")
    for item in keys["unlike"][:20]:
        label = "  (label)" if item["label"] else ""
        line(f"  {item['key']:<34} {_value(item['a'])} → {_value(item['b'])}{label}")
    for side in ("only_a", "only_b"):
        names = keys[side]
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            line(f"  only in {side[-1].upper()}: {', '.join(names[:6])}{more}")


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping) and set(value) == {"id", "text"}:
        return f"{value['id']} {value['text']!r}"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
