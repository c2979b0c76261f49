"""``driftscope inspect``: what one model says of itself, or in what two differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from driftscope.cli.options import AsJson, open_any
from driftscope.cli.show import closed_pipe_ends, interruptible, print_json


def inspect(
    model: Annotated[Path, typer.Argument(help="a model: a file, a folder, or a manifest")],
    other: Annotated[Path | None, typer.Argument(help="another one, to compare the metadata with")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a model on disk is, and what is odd about its metadata; of two, show what differs.

    Only headers are read, no values. With one model the exit code is 0, odd or not. With two it is 0 where
    hyperparameters, tokens, special tokens and chat template agree, else 1; labels do not count.
    """
    from driftscope.analysis.metadata.facts import tokenizer_facts
    from driftscope.analysis.metadata.overview import overview
    from driftscope.analysis.metadata.pair import compare_metadata
    from driftscope.cli.show_inspect import print_comparison, print_overview

    with interruptible():
        first = open_any(model)
        facts = tokenizer_facts(first)
        if other is None:
            document = overview(first, facts=facts)
            with closed_pipe_ends():
                if as_json:
                    print_json(document)
                else:
                    print_overview(document)
            return
        second = open_any(other)
        found = compare_metadata(first, second, facts, tokenizer_facts(second))
        found = {"a": str(first.path), "b": str(second.path), **found}
        with closed_pipe_ends():
            if as_json:
                print_json(found)
            else:
                print_comparison(found)
    if not found["same"]:
        raise typer.Exit(1)
