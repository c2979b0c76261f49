"""Whether a model has every tensor that its hyperparameters ask for, in the right shape."""

from __future__ import annotations

from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.names import is_of_images
from driftscope.errors import InputError


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name, without its layer, to shape (rows, columns) of every tensor of one layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for site, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
        shapes[f"self_attn.{site}_proj.weight"] = (rows, hidden)
        if config.attention_bias:
            shapes[f"self_attn.{site}_proj.bias"] = (rows,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = (config.head_dim,)
        shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    shapes["self_attn.o_proj.weight"] = (hidden, q_rows)
    shapes["post_attention_layernorm.weight"] = (hidden,)
    if config.post_norms:
        shapes["pre_feedforward_layernorm.weight"] = (hidden,)
    shapes["mlp.gate_proj.weight"] = (inner, hidden)
    shapes["mlp.up_proj.weight"] = (inner, hidden)
    shapes["mlp.down_proj.weight"] = (hidden, inner)
    if config.post_norms:
        shapes["post_feedforward_layernorm.weight"] = (hidden,)
    return shapes


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name to shape (rows, columns) of every tensor of a model, in canonical order."""
    vocabulary = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": vocabulary}
    of_a_layer = layer_shapes(config)
    for layer in range(config.num_layers):
        shapes |= {f"model.layers.{layer}.{suffix}": shape for suffix, shape in of_a_layer.items()}
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = vocabulary
    return shapes


def check_complete(artifact: Artifact) -> None:
    """Refuse a model that a forward pass would have to guess about.

    Raises:
        InputError: names the first tensor that is missing, has another shape, or holds a bias that the
            architecture does not have here (leaving it out would change every result), and counts them.
    """
    expected = expected_shapes(artifact.config)
    missing = [name for name in expected if name not in artifact.tensors]
    model = f"{artifact.config.architecture} with {artifact.config.num_layers} layers"
    if missing:
        raise InputError(
            f"{artifact.path}: {missing[0]} is missing{_others(missing)}; {model} has {len(expected)} tensors"
        )
    wrong = [name for name, shape in expected.items() if artifact.tensors[name].shape != shape]
    if wrong:
        found, wanted = artifact.tensors[wrong[0]].shape, expected[wrong[0]]
        raise InputError(
            f"{artifact.path}: {wrong[0]} has the shape {_times(found)}{_others(wrong)}; "
            f"{model} expects {_times(wanted)}"
        )
    unused = [name for name in artifact.tensors if name not in expected] + list(artifact.unmapped)
    biases = [name for name in unused if name.endswith(".bias") and not is_of_images(name)]
    if biases:
        raise InputError(
            f"{artifact.path}: {biases[0]} is a bias that {artifact.config.architecture} does not have"
            f"{_others(biases)}; the model cannot be run without it"
        )


def _others(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
