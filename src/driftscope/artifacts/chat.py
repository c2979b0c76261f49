"""Chat messages to prompt text, through the template that a model carries.

A template is a program that came with a model file. It runs in Jinja's sandbox, as in transformers, and
that sandbox in a process of its own, because the sandbox bounds neither memory nor time: a few characters
of template can ask for a terabyte. The process may use little of either and is then stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from driftscope.errors import InputError

MAX_TEMPLATE_CHARACTERS = 2**20
MAX_PROMPT_BYTES = 8 * 2**20
MAX_CPU_SECONDS = 3
MAX_WALL_SECONDS = 60
MAX_MEMORY_BYTES = 2**30

# What `strftime_now` tells a template: a prompt is evidence, so it cannot depend on the day. It is the date
# that Llama 3's templates fall back to where there is no clock.
TEMPLATE_DATE = datetime(2024, 7, 26)

_FAILED = 3


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str | None = None,
    eos_token: str | None = None,
    variables: Mapping[str, Any] | None = None,
    fold_system: bool = False,
) -> str:
    """Render a conversation as transformers' ``apply_chat_template`` does.

    The one difference is ``strftime_now``, which gives `TEMPLATE_DATE` instead of today.

    Args:
        template: Jinja source.
        messages: ``{role, content}`` dictionaries, of what JSON can hold.
        add_generation_prompt: end with the beginning of the assistant's answer.
        bos_token: text of the token that begins a sequence; not defined in the template if None.
        eos_token: text of the token that ends one; likewise.
        variables: further names that the template may use (``tools``, ``enable_thinking`` ...).
        fold_system: where the template refuses a conversation that begins with a system message, as
            Gemma's do, put that message in front of the first of the user's.

    Raises:
        InputError: the template or a message is not valid, the template refuses the conversation, or it
            takes more time, memory or output than a prompt can need.
    """

    def render(conversation: Sequence[Mapping[str, Any]]) -> str:
        return render_chats(
            template,
            [conversation],
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
            variables=variables,
        )[0]

    try:
        return render(messages)
    except InputError as refusal:
        folded = _folded(messages) if fold_system else None
        if folded is None:
            raise
        try:
            return render(folded)
        except InputError:
            raise refusal from None


def _folded(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]] | None:
    """The conversation with its system message in the user's first one, or None where that cannot be."""
    if len(messages) < 2:
        return None
    system, user = messages[:2]
    parts = (system.get("content"), user.get("content"))
    if (system.get("role"), user.get("role")) != ("system", "user") or not all(
        isinstance(part, str) for part in parts
    ):
        return None
    return [{**user, "content": f"{parts[0]}\n\n{parts[1]}"}, *messages[2:]]


def render_chats(
    template: str,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str | None = None,
    eos_token: str | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[str]:
    """Render several conversations with one template and one process; see `render_chat`."""
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise InputError(
            f"chat template: {len(template)} characters; expected at most {MAX_TEMPLATE_CHARACTERS}"
        )
    for messages in conversations:
        _check_messages(messages)
    context = dict(variables or {})
    for name, text in (("bos_token", bos_token), ("eos_token", eos_token)):
        if text is not None:
            context[name] = text
    context["add_generation_prompt"] = add_generation_prompt
    try:
        job = json.dumps(
            {"template": template, "conversations": [list(m) for m in conversations], "context": context}
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"chat: messages hold something that JSON cannot ({error})") from error
    return _run_job(job)


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise InputError("chat: no messages; expected at least one of {role, content}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"chat: message {index} has no role; expected {{role, content}}")
        if message.get("content") is None and "tool_calls" not in message:
            raise InputError(f"chat: message {index} ({message['role']}) has no content")


def _run_job(job: str) -> list[str]:
    """Render in a process of its own, whose answer is JSON on its standard output."""
    command = [sys.executable, "-I", "-m", "driftscope.artifacts.chat"]
    try:
        done = subprocess.run(
            command, input=job.encode("ascii"), capture_output=True, timeout=MAX_WALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"chat template: not done after {MAX_WALL_SECONDS} s") from error
    if done.returncode == _FAILED:
        raise InputError(f"chat template: {json.loads(done.stdout)}")
    if done.returncode != 0:
        raise InputError(
            f"chat template: stopped with status {done.returncode}; a template may use "
            f"{MAX_CPU_SECONDS} s and {MAX_MEMORY_BYTES // 2**20} MiB"
        )
    return [str(text) for text in json.loads(done.stdout)]


def _main() -> int:
    """The process that renders: a job on standard input, JSON on standard output."""
    _limit_resources()
    job = json.loads(sys.stdin.buffer.read())
    try:
        texts = _render(job["template"], job["conversations"], job["context"])
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        reason = "it needs too much memory" if isinstance(error, MemoryError) else str(error)
        # A template chooses its message, and an error is one line.
        sys.stdout.write(json.dumps(f"{type(error).__name__}: {' '.join(reason.split())[:500]}"))
        return _FAILED
    sys.stdout.write(json.dumps(texts))
    return 0


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits; the wall clock holds everywhere.
        return
    for limit, value in ((resource.RLIMIT_CPU, MAX_CPU_SECONDS), (resource.RLIMIT_AS, MAX_MEMORY_BYTES)):
        hard = resource.getrlimit(limit)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (most, hard))


def _render(template: str, conversations: list[Any], context: dict[str, Any]) -> list[str]:
    """Render in this process: the environment that transformers gives a template."""
    environment = _environment()
    compiled = environment.from_string(template)
    texts = []
    for messages in conversations:
        pieces: list[str] = []
        size = 0
        for piece in compiled.generate(messages=messages, **{"tools": None, "documents": None, **context}):
            size += len(piece.encode("utf-8", "replace"))
            if size > MAX_PROMPT_BYTES:
                raise ValueError(f"more than {MAX_PROMPT_BYTES} bytes of prompt")
            pieces.append(piece)
        texts.append("".join(pieces))
    return texts


def _environment() -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Generation(Extension):
        """``{% generation %}`` marks what the assistant wrote, for training; here it is what is in it."""

        tags = {"generation"}  # noqa: RUF012  # Jinja reads a class attribute.

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A call block has a scope of its own, as in transformers: what is set in it stays in it.
            return nodes.CallBlock(self.call_method("_body", []), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> str:
            return str(caller())

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML, which a prompt is not.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )

    class Namespace(jinja2.utils.Namespace):
        """A namespace whose names the sandbox can vouch for: none that begins with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            # A template may name one of its values `self`.
            values = dict(*args[1:], **kwargs)
            for name in values:
                check_name(name)
            jinja2.utils.Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            super().__setitem__(name, value)

    class Dictionary:
        """``dict`` to call, without the type and its attributes."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def check_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold the name {name!r}")

    environment.filters["tojson"] = tojson
    environment.globals["dict"] = Dictionary()
    environment.globals["namespace"] = Namespace
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    return environment


if __name__ == "__main__":
    sys.exit(_main())
