"""A diff of two models in words: short names of tensors, relations, and the conclusion in a sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from driftscope.report.text import counted, number, percent, size

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_SHORTER = (
    ("self_attn.", "attn."),
    ("post_attention_layernorm", "post_attn_norm"),
    ("pre_feedforward_layernorm", "pre_ffn_norm"),
    ("post_feedforward_layernorm", "post_ffn_norm"),
    ("input_layernorm", "input_norm"),
)
_UNEXPECTED = {
    "different": ("differs by more than its format explains", "differ by more than their formats explain"),
    "non-finite": ("holds values that are not finite", "hold values that are not finite"),
}
_CLEAN = {
    "downcast": "rounded to a smaller type, exactly",
    "quantized-from": "quantized within what the format predicts",
}


def short_name(tensor: str) -> str:
    """``L3 mlp.down_proj`` for ``model.layers.3.mlp.down_proj.weight``."""
    name = tensor.removesuffix(".weight")
    match = _LAYER.fullmatch(name)
    if match is None:
        return name.removeprefix("model.")
    part = match[2]
    for long, short in _SHORTER:
        part = part.replace(long, short)
    return f"L{match[1]} {part}"


def relation_words(relation: str, n: int = 1) -> str:
    """What a relation means."""
    how, under, transform = relation.partition("-under:")
    if under:
        return f"{'' if how == 'equal' else f'{_CLEAN.get(how, how)}, '}the same values under {transform}"
    if relation in _UNEXPECTED:
        return _UNEXPECTED[relation][n != 1]
    return _CLEAN.get(relation, relation.replace("-", " "))


def short_relation(row: Mapping[str, Any]) -> str:
    """A relation for a narrow column: where a transform stands out, that transform."""
    transforms = "+".join(row["transforms"])
    if row["kind"] == "transformed":
        return transforms
    return f"equal ({transforms})" if row["kind"] == "equal-under" else str(row["relation"])


def sentence(document: Mapping[str, Any]) -> str:
    """What a diff found, in one sentence.

    Args:
        document: what `driftscope.analysis.weights.pair_diff.diff_models` returns.
    """
    summary, listed = document["summary"], document["inventory"]
    bad = [row for row in document["tensors"] if not row["holds"]]
    expected = summary["coverage"]["expected"]
    if summary["conclusion"] == "failure":
        if not document["b"]["tensors"]:
            return "Nothing was compared: B holds no tensor whose name is known, or only metadata."
        return "Nothing was compared: no tensor of A has one of the same name and shape in B."
    if summary["conclusion"] == "different-weights":
        statement = summary["statement"] or "Other weights: the two are different trainings"
        return f"{statement.rstrip('.')}."
    if summary["conclusion"] == "incomplete":
        missing = len(listed["missing"])
        parts = [f"{missing} missing"] if missing else []
        unlike = [row for row in bad if not row["compared_count"]]
        parts += [f"{len(unlike)} of another shape"] if unlike else []
        return f"Not whole: of {counted(expected, 'tensor')} {' and '.join(parts)}."
    if bad:
        return _unexpected(bad, len(document["tensors"]))
    said = _expected(document["tensors"])
    if summary["allows_for_a"]:
        said += " A is rounded itself; its own error is allowed for."
    if listed["extra"]:
        said += f" B has {counted(len(listed['extra']), 'tensor')} that A has not."
    changed = [item for item in listed["metadata_differences"] if item["changes"] == "forward-pass"]
    if changed:
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return f"Another forward pass: {metadata_words(changed[0])}{others}. {said}"
    return said


def _unexpected(bad: Sequence[Mapping[str, Any]], n: int) -> str:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in bad:
        by = "corrupt" if row["corrupt"] else "threshold" if row["judged_by"] == "threshold" else row["kind"]
        groups.setdefault(by, []).append(row)
    worst = f", the worst of them {short_name(bad[0]['tensor'])}" if len(bad) > 1 else ""
    if len(groups) == 1:
        subject = short_name(bad[0]["tensor"]) if len(bad) == 1 else f"{len(bad)} of {counted(n, 'tensor')}"
        return f"{subject} {_verb(bad)}{worst}."
    *first, last = [f"{len(rows)} {_verb(rows)}" for rows in groups.values()]
    return f"Of {counted(n, 'tensor')} {', '.join(first)} and {last}{worst}."


def _verb(rows: Sequence[Mapping[str, Any]]) -> str:
    row, one = rows[0], len(rows) == 1
    if row["corrupt"]:
        return f"{'holds' if one else 'hold'} a {row['corrupt'].replace('-', ' ')}"
    if row["judged_by"] == "threshold":
        return "breaks a threshold" if one else "break a threshold"
    if row["kind"] != "transformed":
        return relation_words(row["relation"], len(rows))
    names = list(dict.fromkeys("+".join(item["transforms"]) for item in rows))
    if all(name.startswith("other-layer(") for name in names):
        layer = names[0].removeprefix("other-layer(").rstrip(")")
        return f"holds the values of layer {layer}" if one else "hold the values of other layers"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    under = f"{', '.join(names[:3])}{more}"
    return f"{'is' if one else 'are'} the same only under {under} (declared nowhere)"


def _expected(tensors: Sequence[Mapping[str, Any]]) -> str:
    n = len(tensors)
    bounded = sum(row["judged_by"] == "threshold" for row in tensors)
    if bounded:
        return (
            f"{counted(bounded, 'tensor')} of {n} within the thresholds, the others hold by themselves."
            if (bounded < n)
            else f"All {counted(n, 'tensor')} within the thresholds."
        )
    counts: dict[str, int] = {}
    for row in tensors:
        counts[row["relation"]] = counts.get(row["relation"], 0) + 1
    same = counts.pop("identical", 0)
    if not counts:
        return f"All {counted(n, 'tensor')} have the same values."
    said = ", ".join(f"{count} {relation_words(name)}" for name, count in sorted(counts.items()))
    return f"The same weights: {same} of {counted(n, 'tensor')} identical, {said}."


def share_words(document: Mapping[str, Any]) -> str:
    """How much was compared, where `--only` chose."""
    share = document["summary"]["share"]
    part = share["bytes"] / share["bytes_in_all"] if share["bytes_in_all"] else 0.0
    return (
        f"{share['tensors']} of {counted(share['tensors_in_all'], 'tensor')}, {size(share['bytes'])} of "
        f"{size(share['bytes_in_all'])} ({percent(part)})"
    )


def metadata_words(item: Mapping[str, Any]) -> str:
    """One unlike hyperparameter."""
    if item["key"] == "sliding_layers":
        a, b = ("every layer" if item[side] is None else _value(item[side]) for side in "ab")
        return f"sliding_layers {a} → {b}"
    return f"{item['key']} {_value(item['a'])} → {_value(item['b'])}"


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "none" if value is None else "yes" if value else "no"
    text = number(value) if isinstance(value, float) and abs(value) < 1e-3 else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
