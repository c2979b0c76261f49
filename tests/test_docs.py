"""The documentation says what the code does: generated pages, commands, links, configuration snippets."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import typer
import yaml

from driftscope.cli import app
from driftscope.config import Config, parse_config
from driftscope.contracts import commands as contract_commands
from driftscope.falsifiers import reader, registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
RUN_ELSEWHERE = ("add-a-falsifier.md", "compare-engines.md", "tutorial.md", "write-a-dump.md")
"""Pages whose Python needs files; a test of its own runs it."""
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_INLINE = re.compile(r"`([^`\n]+)`")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> Iterator[str]:
    for found, body in _FENCE.findall(page.read_text("utf-8")):
        if found == language:
            yield body


def commands(page: Path) -> Iterator[str]:
    """Every command line on a page: behind a prompt in a console block, or in back quotes."""
    for body in blocks(page, "console"):
        yield from (line[2:] for line in body.splitlines() if line.startswith("$ "))
    yield from _INLINE.findall(_FENCE.sub("", page.read_text("utf-8")))


def anchors(page: Path) -> set[str]:
    text = _FENCE.sub("", page.read_text("utf-8"))
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_generated_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True
    )
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(_FENCE.sub("", page.read_text("utf-8"))):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_driftscope_commands_and_their_options_exist(page: Path) -> None:
    root = typer.main.get_command(app)
    for line in commands(page):
        words = line.split("#")[0].split()
        if words[:1] != ["driftscope"]:
            continue
        command, rest = root, words[1:]
        while hasattr(command, "commands") and rest and not rest[0].startswith(("-", "<", "…")):
            assert rest[0] in command.commands, line
            command, rest = command.commands[rest[0]], rest[1:]
        known = {option for item in command.params for option in item.opts} | {"--help"}
        unknown = [word for word in rest if word.startswith("-") and word.split("=")[0] not in known]
        assert not unknown, line


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_make_targets_exist(page: Path) -> None:
    used = {line.split()[1] for line in commands(page) if re.match(r"make \w", line)}
    makefile = (ROOT / "Makefile").read_text("utf-8") if used else ""
    assert used <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_named_in_back_quotes_exist(page: Path) -> None:
    """Paths of this repository, from its root; those with a placeholder or a glob are not files."""
    folders = ("src/", "docs/", "tests/", "config/", "contracts/", "workflow/", "benchmarks/")
    for text in _INLINE.findall(_FENCE.sub("", page.read_text("utf-8"))):
        if text.startswith(folders) and not re.search(r"[<*{ ]|my-", text):
            assert (ROOT / text).exists(), text


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_configuration_snippets_are_valid(page: Path) -> None:
    """A snippet may leave sections out: they are taken from the default."""
    default = yaml.safe_load((ROOT / "config" / "config.yaml").read_text("utf-8"))
    for body in blocks(page, "yaml"):
        values = yaml.safe_load(body)
        if not set(values) <= set(Config.model_fields):
            continue
        models = {**default["models"], **values.get("models", {})}
        parse_config({**default, **values, "models": models}, page_id(page))


class Folder:
    """Evidence of a trace in which the first token is far larger than the others."""

    def has(self, name: str) -> bool:
        return True

    def table(self, name: str, schema: str) -> pl.DataFrame:
        rows = []
        for layer in range(8):
            for tap in ("post_attn_residual", "post_ffn_residual"):
                base = {"layer": layer, "tap": tap}
                rows.append({**base, "scope": "token", "position": 0, "rms": 20.0 + layer, "count": 64})
                rows.append({**base, "scope": "all", "position": -1, "rms": 9.0 + layer, "count": 6 * 64})
        return pl.DataFrame(rows)


def test_the_example_of_a_falsifier_measures_and_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "howto" / "add-a-falsifier.md"
    (tmp_path / "first_token.py").write_text(next(blocks(page, "python")), "utf-8")
    (tmp_path / "contract.yaml").write_text(next(blocks(page, "yaml")), "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.MEASUREMENTS, "first_token", "first_token")
    monkeypatch.setattr(reader, "FolderReader", lambda folder, device: Folder())
    contract = tmp_path / "contract.yaml"
    contract_commands.validate([contract])
    measured = contract_commands.measure(contract, "first-token-energy", tmp_path)
    verdict = contract_commands.judge(contract, "first-token-energy", measured)
    assert verdict["verdict"] == "supported"


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in RUN_ELSEWHERE],
    ids=page_id,
)
def test_python_on_the_pages_runs(page: Path) -> None:
    for body in blocks(page, "python"):
        exec(compile(body, page_id(page), "exec"), {})
