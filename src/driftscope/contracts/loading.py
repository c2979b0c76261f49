"""Contract files into contracts; what is wrong is said in one line with file, line and key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, get_args

from pydantic import BaseModel, ValidationError

from driftscope.contracts.model import Contract
from driftscope.contracts.strict_yaml import Location, YamlDocument, load_yaml
from driftscope.errors import InputError

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class ContractFile:
    """A contract and the file it was read from."""

    file: Path
    contract: Contract


def load_contract(path: Path) -> Contract:
    """Read and validate one contract file.

    Raises:
        InputError: unreadable, an unknown key (with the nearest known one), a missing or bad value, an
            id used twice; with file and line.
    """
    return load_model(path, Contract)


def load_contracts(paths: Iterable[Path]) -> list[ContractFile]:
    """Read contracts from files and folders (their ``*.yaml``, sorted by name, not deeper).

    Raises:
        InputError: a file is not a valid contract, none is found, or an id is used by two of them.
    """
    loaded: list[ContractFile] = []
    owners: dict[tuple[str, str], Path] = {}
    for file in contract_files(paths):
        contract = load_contract(file)
        ids = [("contract", contract.id)]
        ids += [("falsifier", falsifier.id) for falsifier in contract.falsifiers]
        ids += [("gate", gate.id) for gate in contract.gates]
        for kind, name in ids:
            if (kind, name) in owners:
                raise InputError(f"{file}: {kind} id `{name}` is already used in {owners[kind, name]}")
            owners[kind, name] = file
        loaded.append(ContractFile(file, contract))
    if not loaded:
        listed = ", ".join(str(path) for path in paths) or "nothing"
        raise InputError(f"{listed}: no contract found; expected *.yaml files")
    return loaded


def contract_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the contract files that `paths` name, folders expanded."""
    for path in paths:
        if path.is_dir():
            yield from sorted(path.glob("*.yaml"))
        else:
            yield path


def load_model(path: Path, model: type[Model]) -> Model:
    """Read one YAML file into a model.

    Raises:
        InputError: the first problem, in one line.
    """
    document = load_yaml(path)
    try:
        return model.model_validate(document.values)
    except ValidationError as error:
        raise InputError(_first_problem(error, document, model)) from error


def _first_problem(error: ValidationError, document: YamlDocument, model: type[BaseModel]) -> str:
    problems = error.errors()
    unknown = [item for item in problems if item["type"] == "extra_forbidden"]
    problem = (unknown or problems)[0]
    location: Location = tuple(problem["loc"])
    where = f"{document.file}:{document.line(_in_file(location, document))}"
    key = ".".join(str(part) for part in location)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = sorted(known_keys(model))
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        return f"{where}: unknown key `{key}`" + (f"; did you mean `{near[0]}`?" if near else "") + more
    if problem["type"] == "missing":
        return f"{where}: `{key}` is missing{more}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {f'`{key}`: ' if key else ''}{message}{more}"


def _in_file(location: Location, document: YamlDocument) -> Location:
    """Drop the steps of a pydantic location that name a branch of a union, not a key of the file."""
    kept: Location = ()
    for step in location:
        if (*kept, step) in document.lines:
            kept = (*kept, step)
    return kept


def known_keys(model: type[BaseModel]) -> set[str]:
    """Return the field names of a model and of every model inside it."""
    found: set[str] = set()
    waiting: list[type[BaseModel]] = [model]
    seen: set[type[BaseModel]] = set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for name, field in current.model_fields.items():
            found.add(field.alias or name)
            waiting.extend(_models_in(field.annotation))
    return found


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
