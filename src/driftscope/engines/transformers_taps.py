"""Where the taps of a transformers model are, and the hooks that take them.

Most are the input or the output of a module. What lies inside of the attention is seen by an attention
function that stands before the model's own in transformers' ``AttentionInterface``: its arguments are q and k
after RoPE, and a torch function mode sees the scores and their softmax where the model's own computes them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.engines.hooks import INPUT, OUTPUT, hooks, host_copy
from driftscope.engines.trace import RAGGED
from driftscope.errors import InputError
from driftscope.forward.architecture import tap_name
from driftscope.forward.policy import WHOLE_MODEL

F32 = NDArray[np.float32]

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")

_BASE, _HEAD = "model", "lm_head"
_LAYERS = f"{_BASE}.layers"

_WHOLE = (
    (f"{_BASE}.embed_tokens", OUTPUT, "embedding"),
    (f"{_BASE}.norm", OUTPUT, "final_norm"),
    (_HEAD, OUTPUT, "lm_head"),
)
"""Module, side and tap. The logits are the head's output, or the model's where it caps them."""

_QKV = tuple(f"qkv_bias.{site}" for site in ("q", "k", "v"))
_GATE_UP = ("ffn_gate", "ffn_up")

_Modules = tuple[tuple[str, str, str | tuple[str, ...]], ...]
"""Module within its layer, side, and tap with its part; several taps where they lie side by side."""

_PROJECTED: _Modules = (
    *((f"self_attn.{tap[-1]}_proj", OUTPUT, tap) for tap in _QKV),
    ("mlp.gate_proj", OUTPUT, "ffn_gate"),
    ("mlp.up_proj", OUTPUT, "ffn_up"),
    ("mlp.act_fn", OUTPUT, "ffn_silu"),
)
_FUSED: _Modules = (
    ("self_attn.qkv_proj", OUTPUT, _QKV),
    ("mlp.gate_up_proj", OUTPUT, _GATE_UP),
    ("mlp.activation_fn", OUTPUT, "ffn_silu"),
)
_ALWAYS: _Modules = (
    ("input_layernorm", OUTPUT, "attn_norm"),
    ("self_attn.o_proj", INPUT, "attention"),
    ("self_attn.o_proj", OUTPUT, "attn_out"),
    ("mlp.down_proj", INPUT, "ffn_swiglu"),
    ("mlp.down_proj", OUTPUT, "ffn_out"),
)
_PRE_NORMS: _Modules = (
    ("post_attention_layernorm", INPUT, "post_attn_residual"),
    ("post_attention_layernorm", OUTPUT, "ffn_norm"),
)
_PRE_AND_POST_NORMS: _Modules = (
    ("post_attention_layernorm", OUTPUT, "post_attn_norm"),
    ("pre_feedforward_layernorm", INPUT, "post_attn_residual"),
    ("pre_feedforward_layernorm", OUTPUT, "ffn_norm"),
    ("post_feedforward_layernorm", OUTPUT, "post_ffn_norm"),
)


def _modules_of(architecture: str) -> _Modules:
    """Where the taps of a layer are."""
    if architecture == "phi3":
        return (*_ALWAYS, *_PRE_NORMS, *_FUSED)
    norms = _PRE_AND_POST_NORMS if architecture.startswith("gemma") else _PRE_NORMS
    return (*_ALWAYS, *norms, *_PROJECTED)


_PROJECTIONS = ("q", "k", "v", "qkv")

_WATCHERS: dict[int, _Watcher] = {}
"""``id`` of an attention module to who watches it now. transformers keeps registered functions for good, so
the registered ones hold no model and no watcher themselves."""

Keep = Callable[[int, str, F32], None]
"""Called with the layer (`WHOLE_MODEL` for none), the tap with its part, and ``float32[t, channels]``."""


class _Watcher:
    """Takes the taps of one pass over one sequence at a time.

    Only what runs inside of a layer is that layer's: a module that two layers share is told apart so.
    """

    def __init__(
        self, keep: Keep, done: Callable[[int], None], wanted: Callable[[int, str], bool], *, biased: bool
    ) -> None:
        self.layer = WHOLE_MODEL
        self.keep = keep
        self.done = done
        self.wanted = wanted
        # Without a bias, what q_proj and so on give is the product too.
        self.same_as = {} if biased else {"qkv_bias": ("qkv_matmul",)}

    def enter(self, layer: int, _: Any) -> None:
        self.layer = layer

    def leave(self, layer: int, hidden: Any) -> None:
        self.take(layer, "post_ffn_residual", hidden)
        self.layer = WHOLE_MODEL
        self.done(layer)

    def take(self, layer: int, tap: str, tensor: Any) -> None:
        """Keep a tensor ``[1, t, channels]``, or ``[t, channels]``, if it is wanted and the pass is there."""
        name, dot, part = tap.partition(".")
        names = [each for each in (name, *self.same_as.get(name, ())) if self.wanted(layer, each)]
        if layer != self.layer or not names:
            return
        array = host_copy(tensor)
        if array.ndim == 3 and array.shape[0] == 1:
            array = array[0]
        if array.ndim != 2:
            raise InputError(
                f"{tap_name(layer, tap)}: the module gives the shape {list(array.shape)}; "
                "expected one sequence of tokens x channels"
            )
        for each in names:
            self.keep(layer, f"{each}{dot}{part}", array)

    def take_all(self, layer: int, taps: str | tuple[str, ...], widths: tuple[int, ...], tensor: Any) -> None:
        """Keep a tensor, or the parts of it that lie side by side."""
        if isinstance(taps, str):
            self.take(layer, taps, tensor)
            return
        for tap, part in zip(taps, tensor.split(widths, dim=-1), strict=True):
            self.take(layer, tap, part)

    def attend(self, original: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
        """Run an attention function and keep what it is given and what it computes on the way."""
        arguments = dict(zip(("query", "key", "value", "attention_mask"), args, strict=False)) | kwargs
        for tap, name in (("q_post_rope", "query"), ("k_post_rope", "key")):
            # [1, heads, t, head_dim], as transformers' attention functions have it
            self.take(self.layer, tap, arguments[name].transpose(1, 2).flatten(2))
        if not any(self.wanted(self.layer, tap) for tap in RAGGED):
            return original(module, *args, **kwargs)
        length = arguments["query"].shape[2]
        seen = _SoftmaxSeen(arguments.get("attention_mask"), alone=length == 1)
        with seen.mode():
            result = original(module, *args, **kwargs)
        weights = result[1] if isinstance(result, tuple) and len(result) > 1 else None
        if seen.ran and weights is None:
            weights = seen.weights.to(arguments["query"].dtype)
        for tap, tensor in (("attn_scores", seen.scores), ("attn_softmax", weights)):
            if tensor is not None:
                # [1, heads, queries, keys] to [queries, heads * keys], head by head
                self.take(self.layer, tap, tensor.transpose(1, 2).flatten(2))
        return result


class _SoftmaxSeen:
    """Sees the softmax of an attention function, and the scores before the mask is added to them.

    Attributes:
        ran: a softmax was taken.
        scores: its input before the mask, ``[1, heads, t, t]``, or None where that was not seen.
        weights: its output.
    """

    def __init__(self, mask: Any, *, alone: bool) -> None:
        self._mask = mask
        # A query with a single key has nothing to be masked.
        self._alone = alone
        self.ran = False
        self.scores: Any = None
        self.weights: Any = None

    def mode(self) -> Any:
        """A context in which torch's functions are seen."""
        import torch
        from torch.overrides import TorchFunctionMode

        add = (torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__iadd__, torch.Tensor.__radd__)
        softmax = (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax)
        seen = self

        class Mode(TorchFunctionMode):
            def __torch_function__(
                self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
            ) -> Any:
                if func in add and len(args) > 1:
                    # Before it runs: it may be in place.
                    seen.added(args[0], args[1])
                elif func in softmax and args:
                    seen.entered(args[0])
                result = func(*args, **(kwargs or {}))
                if func in softmax:
                    seen.ran, seen.weights = True, result
                return result

        return Mode()

    def added(self, left: Any, right: Any) -> None:
        """An addition; of the mask, it is to the scores."""
        for scores, mask in ((left, right), (right, left)):
            if self._is_mask(mask) and not self._is_mask(scores) and hasattr(scores, "detach"):
                self.scores = scores.detach().clone()

    def entered(self, tensor: Any) -> None:
        """The softmax is about to be taken."""
        if self.scores is None and self._alone:
            self.scores = tensor.detach().clone()

    def _is_mask(self, tensor: Any) -> bool:
        """Whether a tensor is the mask, or a view of it."""
        if self._mask is None or not hasattr(tensor, "untyped_storage"):
            return False
        return bool(tensor.untyped_storage().data_ptr() == self._mask.untyped_storage().data_ptr())


@contextmanager
def watched(
    model: Any,
    where: str,
    keep: Keep,
    done: Callable[[int], None],
    wanted: Callable[[int, str], bool],
) -> Iterator[None]:
    """Take the taps of every pass of a model while the context is open.

    Args:
        model: a causal language model of transformers.
        where: what messages name.
        keep: receives copies.
        done: called with each layer after its last tap.
        wanted: whether a tap (layer, name) is taken.

    Raises:
        InputError: the model's modules are not where they are expected.
    """
    layers = layers_of(model, where)
    watcher = _Watcher(keep, done, wanted, biased=has_bias(model))
    with ExitStack() as stack:
        watch = stack.enter_context(hooks())
        capped = getattr(model.config, "final_logit_softcapping", None) is not None
        for path, side, tap in _WHOLE:
            if not (capped and tap == "lm_head"):
                watch(model.get_submodule(path), side, partial(watcher.take, WHOLE_MODEL, tap))
        if capped:
            watch(model, OUTPUT, lambda result: watcher.take(WHOLE_MODEL, "lm_head", result.logits))
        for number, layer in enumerate(layers):
            watch(layer, INPUT, partial(watcher.enter, number))
            for path, side, taps in _modules_of(model.config.model_type):
                widths = () if isinstance(taps, str) else _widths(model.config, taps)
                watch(layer.get_submodule(path), side, partial(watcher.take_all, number, taps, widths))
            watch(layer, OUTPUT, partial(watcher.leave, number))
        stack.enter_context(_attention_watched(model, layers, watcher))
        yield


def layers_of(model: Any, where: str) -> list[Any]:
    """The decoder layers that a pass runs.

    Raises:
        InputError: another architecture, or a module is missing.
    """
    found = getattr(getattr(model, "config", None), "model_type", None)
    if found not in SUPPORTED:
        raise InputError(
            f"{where}: transformers' architecture {found!r} has no taps; "
            f"expected one of {', '.join(SUPPORTED)}"
        )
    for path in [_LAYERS, *(path for path, _, _ in _WHOLE)]:
        _submodule(model, path, where, path)
    layers = list(model.get_submodule(_LAYERS))[: model.config.num_hidden_layers]
    for number, layer in enumerate(layers):
        for path in dict.fromkeys(path for path, _, _ in _modules_of(found)):
            _submodule(layer, path, where, f"{_LAYERS}.{number}.{path}")
    return layers


def has_bias(model: Any) -> bool:
    """Whether any of q, k and v has a bias, which torch adds inside of the product."""
    return any(
        getattr(getattr(layer.self_attn, f"{site}_proj", None), "bias", None) is not None
        for layer in model.get_submodule(_LAYERS)
        for site in _PROJECTIONS
    )


def _widths(config: Any, taps: tuple[str, ...]) -> tuple[int, ...]:
    """Channels of taps that a fused module gives side by side."""
    if taps == _GATE_UP:
        return (config.intermediate_size,) * 2
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = config.num_key_value_heads * head_dim
    return config.num_attention_heads * head_dim, kv, kv


@contextmanager
def _attention_watched(model: Any, layers: list[Any], watcher: _Watcher) -> Iterator[None]:
    """Put `_Watcher.attend` before the attention function of a model."""
    from transformers import AttentionInterface, AttentionMaskInterface

    before = model.config._attn_implementation
    name = f"driftscope+{before}"
    AttentionInterface.register(name, partial(_attend, before))
    masks = AttentionMaskInterface()
    if before in masks:
        AttentionMaskInterface.register(name, masks[before])
    keys = [id(layer.get_submodule("self_attn")) for layer in layers]
    _WATCHERS.update(dict.fromkeys(keys, watcher))
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)
        for key in keys:
            _WATCHERS.pop(key, None)


def _attend(implementation: str, module: Any, *args: Any, **kwargs: Any) -> Any:
    """The attention function that transformers calls: the model's own, watched."""
    from transformers import AttentionInterface

    original = AttentionInterface().get(implementation) or _eager(module)
    watcher = _WATCHERS.get(id(module))
    if watcher is None:
        return original(module, *args, **kwargs)
    return watcher.attend(original, module, *args, **kwargs)


def _eager(module: Any) -> Callable[..., Any]:
    """The eager attention function of a module: a global of the file that defines its class."""
    for kind in inspect.getmro(type(module)):
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            eager: Callable[..., Any] = found
            return eager
    raise InputError(f"transformers' {type(module).__name__} has no eager attention function")


def _submodule(parent: Any, path: str, where: str, full: str) -> Any:
    try:
        return parent.get_submodule(path)
    except AttributeError as error:
        raise InputError(
            f"{where}: the model has no module {full}; expected the layout of {', '.join(SUPPORTED)}"
        ) from error


def absent_reasons(model: Any, attention: str) -> Mapping[str, str]:
    """Tap to the reason why no layer gives it."""
    reasons = {}
    if has_bias(model):
        reasons["qkv_matmul"] = "the bias is added inside of torch's linear: only qkv_bias is seen"
    if attention == "sdpa":
        reasons["attn_scores"] = reasons["attn_softmax"] = "scaled_dot_product_attention does not give it"
    return reasons
