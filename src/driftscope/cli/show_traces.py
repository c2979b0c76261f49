"""What trace, compare and replay print: tables that fit a terminal of 80 columns."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from driftscope.engines.trace import Trace

_SHOWN = {
    "attn_norm": "attn norm",
    "qkv_bias": "q, k, v",
    "attention": "attention",
    "post_attn_norm": "its norm",
    "post_attn_residual": "+ attn",
    "ffn_norm": "ffn norm",
    "ffn_swiglu": "swiglu",
    "post_ffn_norm": "its norm",
    "post_ffn_residual": "+ ffn",
}
"""Taps of a layer that have a column, and what it is called; not every architecture has each."""

_PACKAGES = {"llama.cpp": "llama-cpp-python"}

_MOST_POINTS = 4

_MATMULS = ("qkv_matmul", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head")

FLOOR = 1e-12
"""NMSE up to which a difference is put down to the rounding of float32 sums (`driftscope.analysis.vote`)."""


def print_trace(trace: Trace) -> None:
    """Say what was written."""
    manifest = trace.manifest
    layers = {layer for layer, _ in trace.places if layer >= 0}
    size = sum(file.stat().st_size for file in trace.folder.iterdir() if file.is_file())
    prompts = _count(len(manifest.prompts), "prompt")
    console = _console()
    _line(
        console,
        f"{trace.folder}: {_count(len(trace.places), 'tap')} of {_count(len(layers), 'layer')}, "
        f"{_count(trace.batch.n_tokens, 'token')} of {prompts}, {_bytes(size)}",
    )
    _line(console, f"  {_engine(manifest.engine)}, {_arithmetic(_plain(manifest))}")
    for tap, why in manifest.absent.items():
        _line(console, f"  no {tap}: {why}")


def print_comparison(found: Mapping[str, Any], max_nmse: float | None) -> None:
    """Print a comparison: what may be compared, the table, the first difference, the vote."""
    console = _console()
    for item in found["traces"]:
        _line(console, f"{item['name']}: {_engine(item['engine'])}, {_arithmetic(item['arithmetic'])}")
    failed = [check for check in found["admissibility"]["checks"] if check["status"] == "fails"]
    _reasons(console, "not compared", found["left_out"])
    if failed:
        _line(console, f"inadmissible: {failed[0]['asked']}, but {failed[0]['found']}", "bold red")
        return
    for item in found["identities"]:
        reading = f": {item['reading']}" if item["reading"] else ": another capture point, or another op"
        figures = f"NMSE {item['nmse']:.2g}, tolerance {item['tolerance']:.2g}"
        where = _layers(item["layers"])
        _line(console, f"{item['trace']}: {item['identity']} fails in {where} ({figures}){reading}", "yellow")
    for pair in found["pairs"]:
        console.print()
        _line(console, f"NMSE of {pair['b']} against {pair['a']}, as propagated, first tokens apart", "bold")
        _pair_table(console, pair["taps"])
        _line(console, _first_difference(pair))
    for travelled in found.get("propagation", ()):
        console.print()
        _line(console, f"error of {travelled['b']} against {travelled['a']}, as energies", "bold")
        _propagation_table(console, travelled["steps"])
    if found["vote"]:
        console.print()
        _line(console, f"vote: {found['vote']['conclusion']}", "bold")
    if max_nmse is not None:
        over = [tap for pair in found["pairs"] for tap in pair["taps"] if (tap["nmse"] or 0.0) > max_nmse]
        verdict = f"{_count(len(over), 'tap')} above" if over else "every tap is at or below"
        _line(console, f"{verdict} an NMSE of {max_nmse:g}", "bold red" if over else "bold green")


def print_diagnosis(found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], limit: int) -> None:
    """Print a replay: what it was judged by, the worst ops, the first divergence."""
    console = _console()
    reference = f", reference {found['reference']}" if found["reference"] else ""
    _line(
        console,
        f"{_engine(found['engine'])} on {found['own']}{reference}, {_arithmetic(found['arithmetic'])}",
    )
    if "guess" in found:
        _line(console, f"guessed: {found['guess']['statement']}")
    if found["status"] != "done":
        _line(console, f"{found['status']}: {found['reason']}", "bold red")
        return
    _rows_table(console, rows, found["flagged"], limit)
    _line(console, _price(found["map"]))
    tested = f"{_count(found['tested'], 'op')} in {_count(found['prompts'], 'prompt')}"
    for item in found["capture_points"][:_MOST_POINTS]:
        _line(console, f"capture point: {item['statement']}", "yellow")
    if (more := len(found["capture_points"]) - _MOST_POINTS) > 0:
        _line(console, f"capture point: … and {more} more", "yellow")
    first = found["first"]
    if first is None:
        note = ", but for what was captured elsewhere" if found["capture_points"] else ""
        _line(console, f"clean: {tested} at their floors{note}", "bold green")
        return
    flagged = {(flag["layer"], flag["tap"], flag["part"]) for flag in found["flagged"]}
    _line(console, f"{len(flagged)} of {tested} are above their floors", "bold red")
    _line(console, f"first: {_place(first)} ({first['component']}), {first['class']}", "bold")
    _line(console, f"  {first['statement']}")
    if found["fits_better"]:
        _line(console, "  look at the rest with --arithmetic guess", "yellow")
    if first.get("note") == "row-count":
        _line(console, "  at some token counts only: both shorter and longer prompts are clean there")
    for other in first.get("others", ()):
        _line(console, f"  or {other['class']}: {other['statement']}", "dim")


def _pair_table(console: Console, taps: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("layer", justify="right")
    there = {tap["tap"] for tap in taps}
    shown = {tap: name for tap, name in _SHOWN.items() if tap in there}
    for name in shown.values():
        table.add_column(name, justify="right", no_wrap=True, min_width=8)
    by_layer: dict[int, dict[str, Mapping[str, Any]]] = {}
    for tap in taps:
        by_layer.setdefault(tap["layer"], {})[tap["tap"]] = tap
    whole = by_layer.pop(-1, {})
    for layer, found in by_layer.items():
        table.add_row(str(layer), *(_cell(found.get(name)) for name in shown))
    if by_layer:
        console.print(table)
    said = [
        f"{name} {_cell(whole[name])}" for name in ("embedding", "final_norm", "lm_head") if name in whole
    ]
    if said:
        console.print("   ".join(said))


def _propagation_table(console: Console, steps: Sequence[Mapping[str, Any]]) -> None:
    """Injected and inherited error behind each part of the model, in units of the signal."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("behind", no_wrap=True)
    for name in ("comes in", "injected", "inherited", "cross", "goes out", "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for step in steps:
        # What comes in is in units of the signal that it comes in with: that behind the step before.
        follows = before is not None and step["layer"] in (-1, before["layer"] + 1)
        incoming = _over(step["energy_in"], before["signal_energy"]) if before and follows else None
        cells = [_over(step[key], step["signal_energy"]) for key in ("injected", "inherited", "cross")]
        place = f"layer {step['layer']}" if step["layer"] >= 0 else step["tap"]
        gain = "-" if step["gain"] is None else f"{step['gain']:.2f}"
        table.add_row(place, *(_figure(cell) for cell in (incoming, *cells, step["nmse"])), gain)
        before = step
    console.print(table)


def _over(energy: float, signal: float) -> float | None:
    return energy / signal if signal > 0 else None


def _cell(tap: Mapping[str, Any] | None) -> Any:
    from rich.text import Text

    if tap is None:
        return Text("·", style="dim")
    if tap["not_finite"]:
        return Text("not fin.", style="bold red")
    if tap["nmse"] is None:
        return Text("-", style="dim")
    nmse = _nmse(tap)
    return Text("0" if nmse == 0 else f"{nmse:.1e}", style=_shade(nmse))


def _shade(nmse: float) -> str:
    if nmse < 1e-9:
        return "dim"
    return "green" if nmse < 1e-5 else ("yellow" if nmse < 1e-2 else "red")


def _first_difference(pair: Mapping[str, Any]) -> str:
    first = pair["first"]
    if first is None:
        return f"{pair['a']} and {pair['b']} are equal, bit for bit, at all {len(pair['taps'])} taps"
    parts = [f"first difference: {_place(first)}, NMSE {_figure(first['nmse'])}"]
    beyond = next((tap for tap in pair["taps"] if tap["not_finite"] or _nmse(tap) > FLOOR), None)
    if beyond is None:
        parts[0] += "; none is beyond the rounding of float32 sums"
    elif beyond is not first:
        parts[0] += f"; beyond the rounding of float32 sums: {_place(beyond)}, NMSE {_figure(_nmse(beyond))}"
    if rise := _rise(pair["taps"]):
        before, after = rise
        parts.append(
            f"largest rise: {_place(after)}, {_figure(_nmse(before))} → {_figure(_nmse(after))} "
            f"from {_place(before)}"
        )
    worst = max(pair["taps"], key=_nmse)
    at = worst["worst"]
    token = f" (worst at token {at['position']} of {at['prompt']})" if at else ""
    parts.append(f"largest: {_place(worst)}, NMSE {_figure(_nmse(worst))}{token}")
    return "\n".join(parts)


def _rise(taps: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The two neighbours on the residual stream between which the error grows most."""
    stream = [tap for tap in taps if tap["tap"] in ("embedding", "post_attn_residual", "post_ffn_residual")]
    pairs = [(a, b) for a, b in itertools.pairwise(stream) if _nmse(a) > FLOOR and _nmse(b) > 0]
    return max(pairs, key=lambda pair: _nmse(pair[1]) / _nmse(pair[0]), default=None)


def _nmse(tap: Mapping[str, Any]) -> float:
    """Without the first token of each prompt, which may dwarf all others, where there are others."""
    found = tap["nmse_all_but_first"]
    return float((tap["nmse"] if found is None else found) or 0.0)


def _rows_table(
    console: Console, rows: Sequence[Mapping[str, Any]], flagged: Sequence[Mapping[str, Any]], limit: int
) -> None:
    """The ops that are farthest above what is predicted, flagged ones first."""
    from rich.table import Table
    from rich.text import Text

    from driftscope.forward.architecture import op_order

    marks: dict[tuple[int, str, str, str], float] = {}
    for flag in flagged:
        key = _key(flag)
        marks[key] = min(marks.get(key, math.inf), flag["p_value"])
    worst: dict[tuple[int, str, str, str], Mapping[str, Any]] = {}
    for row in rows:
        if row["component"] != "arithmetic" and _height(row) > _height(worst.get(_key(row))):
            worst[_key(row)] = row
    ranked = sorted(
        worst.values(),
        key=lambda row: (
            _key(row) not in marks,
            op_order(*_key(row)[:3]) if _key(row) in marks else (0,),
            -_height(row),
        ),
    )
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("op", overflow="fold")
    table.add_column("error of", no_wrap=True)
    for name in ("nmse", "predicted", "decades over", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in ranked[:limit]:
        p = marks.get(_key(row))
        signal, predicted = row["signal_energy"], row["predicted_energy"]
        table.add_row(
            Text(_place(row), style="bold" if p is not None else ""),
            row["component"],
            "not finite" if row["non_finite"] else _figure(row["nmse"]),
            _figure(predicted / signal if signal else None),
            "-" if row["score"] is None else f"{row['score']:+.1f}",
            Text("floor", style="dim") if p is None else Text(f"{p:.1g}", style="bold red"),
        )
    console.print(table)
    if len(ranked) > limit:
        console.print(f"… and {len(ranked) - limit} more ops (--limit)", style="dim")


def _price(local: Sequence[Mapping[str, Any]]) -> str:
    """What a matmul typically costs, by component."""
    parts = []
    for component, words in (
        ("engine", "beyond its arithmetic"),
        ("arithmetic", "by its arithmetic"),
        ("model", "by its weights"),
    ):
        found = [item[component] for item in local if item["tap"] in _MATMULS and item[component] is not None]
        if found:
            parts.append(f"{statistics.median(found):.2g} {words}")
    return f"a matmul is off by an NMSE of {', '.join(parts)} (medians)" if parts else "no matmul was tested"


def _key(row: Mapping[str, Any]) -> tuple[int, str, str, str]:
    return row["layer"], row["tap"], row["part"], row["component"]


def _height(row: Mapping[str, Any] | None) -> float:
    if row is None:
        return -math.inf
    if row["non_finite"]:
        return math.inf
    return -1e3 if row["score"] is None else float(row["score"])


def _place(item: Mapping[str, Any]) -> str:
    part = f".{item['part']}" if item.get("part") else ""
    return (item["tap"] if item["layer"] < 0 else f"layers.{item['layer']}.{item['tap']}") + part


def _engine(engine: Mapping[str, Any]) -> str:
    version = engine.get("version")
    name = str(engine.get("name", "unknown engine"))
    if isinstance(version, Mapping):
        # An engine names its own version and those of what it stands on.
        version = version.get(name) or version.get(_PACKAGES.get(name, ""))
    return f"{name} {version}" if version else name


def _arithmetic(declared: Mapping[str, Any] | None) -> str:
    """An arithmetic in words."""
    if declared is None:
        return "arithmetic unknown"
    parts = [str(declared.get("path", "f32"))]
    if declared.get("activation"):
        parts.append(f"activations {declared['activation']}")
    if declared.get("dtype", "f32") != "f32":
        parts = [str(declared["dtype"])]
    if declared.get("kv_type", "f32") != "f32":
        parts.append(f"keys and values {declared['kv_type']}")
    if declared.get("overrides"):
        parts.append("other choices at some sites")
    return ", ".join(parts)


def _plain(manifest: Any) -> Mapping[str, Any] | None:
    return None if manifest.arithmetic is None else manifest.arithmetic.to_dict()


def _reasons(console: Console, what: str, items: Iterable[Mapping[str, str]]) -> None:
    taps: dict[str, list[str]] = {}
    for item in items:
        taps.setdefault(item["reason"], []).append(item["tap"])
    for reason, names in taps.items():
        listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        _line(console, f"{what}: {listed} ({reason})", "dim")


def _layers(layers: Sequence[int]) -> str:
    shown = ", ".join(map(str, layers[:6])) + (" …" if len(layers) > 6 else "")
    return f"layer {shown}" if len(layers) == 1 else f"{len(layers)} layers ({shown})"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _bytes(n: int) -> str:
    return f"{n / 2**20:,.1f} MiB" if n >= 2**20 else f"{n / 2**10:,.1f} KiB"


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)
