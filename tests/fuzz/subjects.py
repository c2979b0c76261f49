"""The formats that are fuzzed: good models to start from, and how each is changed."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
import tokenizers

from driftscope.artifacts.names import ROPE_FREQS
from driftscope.artifacts.open import open_artifact
from tests.fuzz.apr_structure import change_apr
from tests.fuzz.gguf_structure import change_gguf
from tests.fuzz.mutations import NUMBERS, TEXTS, Pairs, change_bytes, change_json, dumped, number, parsed
from tests.helpers import apr_bytes

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 32, 32, 2, 1, 16, 24
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Special:
    """What is not a file: a ``link`` to a target, a ``pipe`` or a ``folder``."""

    kind: str
    target: str = ""


Content = bytes | Special
Case = Mapping[str, Content]
"""An input: file name to what is there."""


@dataclass(frozen=True)
class Subject:
    """One format.

    Attributes:
        seeds: good inputs, as many as there are ways to write one.
        main: what of a case is opened, relative to its folder.
        change: one changed input from two others.
    """

    seeds: Callable[[], list[Case]]
    main: Callable[[Case], str]
    change: Callable[[Random, Case, Case], Case]


def place(case: Case, folder: Path) -> None:
    """Put an input on disk, in an empty folder."""
    for name, content in case.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content.kind == "link":
            path.symlink_to(content.target)
        elif content.kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()


def clear(folder: Path) -> None:
    """Empty a folder, following no link."""
    for path in folder.iterdir():
        if not path.is_symlink() and path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


# --- Good models.


def shapes(architecture: str = "llama") -> dict[str, tuple[int, ...]]:
    """GGUF name to shape of a model of one layer, small enough that thousands a minute are read."""
    kv_rows = KV_HEADS * HEAD_DIM
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, HIDDEN),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_k.weight": (kv_rows, HIDDEN),
        "blk.0.attn_v.weight": (kv_rows, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (INNER, HIDDEN),
        "blk.0.ffn_up.weight": (INNER, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, INNER),
        "output_norm.weight": (HIDDEN,),
    }
    if architecture == "qwen2":
        found |= {f"blk.0.attn_{site}.bias": found[f"blk.0.attn_{site}.weight"][:1] for site in "qkv"}
    if architecture in ("qwen3", "gemma3"):
        found |= {f"blk.0.attn_{site}_norm.weight": (HEAD_DIM,) for site in "qk"}
    if architecture == "gemma3":
        found |= {f"blk.0.post_{site}_norm.weight": (HIDDEN,) for site in ("attention", "ffw")}
    if architecture == "phi3":
        rows = [found.pop(f"blk.0.attn_{site}.weight")[0] for site in "qkv"]
        found |= {"blk.0.attn_qkv.weight": (sum(rows), HIDDEN), "blk.0.ffn_up.weight": (2 * INNER, HIDDEN)}
        found |= {"output.weight": found["token_embd.weight"]}
        del found["blk.0.ffn_gate.weight"]
    return found


TOKENS = ("<|endoftext|>", "<|im_start|>", *"abcdefghijklmnopqr", "ab", "abc", "Ġ", "<tool>")
MERGES = (("a", "b"), ("ab", "c"))
_CONTROL, _NORMAL, _USER_DEFINED = 3, 1, 4
TYPES = (_CONTROL, _CONTROL, *(_NORMAL,) * (VOCAB - 3), _USER_DEFINED)
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)


def _add_sentencepiece(writer: gguf.GGUFWriter) -> None:
    """The keys of a SentencePiece vocabulary of the same size."""
    tokens = ("<unk>", "<s>", "</s>", "<0x61>", "▁", *"abcdefghijklmnop", "ab", "▁a", "abc")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(VOCAB)])
    writer.add_token_types([2, 3, 3, 6, *[1] * (VOCAB - 4)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def tokenizer_json() -> bytes:
    """The same tokenizer as a ``tokenizer.json``, written by the tokenizers package."""
    ids = {text: index for index, text in enumerate(TOKENS)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=list(MERGES)))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([TOKENS[0], TOKENS[1]])
    backend.add_tokens([TOKENS[-1]])
    return backend.to_str().encode()


def sentencepiece_model() -> bytes:
    """A ``tokenizer.model`` of `VOCAB` pieces: what is needed of SentencePiece's ``ModelProto``."""

    def field(number_: int, stored: bytes) -> bytes:
        return bytes([number_ << 3 | 2, len(stored)]) + stored

    pieces = [
        ("<unk>", 2),
        ("<s>", 3),
        ("</s>", 3),
        ("<0x61>", 6),
        ("▁", 1),
        ("ab", 1),
        ("▁a", 1),
        ("abc", 1),
    ]
    pieces += [(letter, 1) for letter in "abcdefghijklmnop"]
    packed = b""
    for rank, (text, kind) in enumerate(pieces):
        score = b"\x15" + struct.pack("<f", -rank)
        packed += field(1, field(1, text.encode()) + score + bytes([3 << 3, kind]))
    # BPE, with a fall-back to bytes.
    trainer = bytes([3 << 3, 2, 0x98, 2, 1])
    return packed + field(2, trainer) + field(3, field(1, b"identity") + bytes([3 << 3, 1, 4 << 3, 0]))


def _values(shape: tuple[int, ...], seed: int) -> Any:
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape, dtype=np.float32)


def gguf_files(
    architecture: str = "llama", *, quantized: bool = False, sentencepiece: bool = False, parts: int = 1
) -> dict[str, bytes]:
    """File name to bytes of a GGUF model, in one file or in parts."""
    with tempfile.TemporaryDirectory() as folder:
        limit = -(-len(shapes(architecture)) // parts) if parts > 1 else 0
        writer = gguf.GGUFWriter(Path(folder) / "m.gguf", architecture, split_max_tensors=limit)
        writer.add_block_count(1)
        writer.add_context_length(64)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        if quantized:
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(4.0)
            writer.add_rope_scaling_orig_ctx_len(32)
        (_add_sentencepiece if sentencepiece else _add_tokenizer)(writer)
        kinds = [gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "F16", "BF16", "Q5_1")]
        for index, (name, shape) in enumerate(shapes(architecture).items()):
            values = _values(shape, index)
            if quantized and len(shape) == 2:
                kind = kinds[index % len(kinds)]
                writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, values)
        if not quantized and architecture == "llama":
            writer.add_tensor("rope_freqs.weight", np.ones(HEAD_DIM // 2, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


_IN_GGUF = {"mistral": "llama", "gemma3_text": "gemma3"}


def hf_files(architecture: str = "llama", **options: Any) -> dict[str, bytes]:
    """File name to bytes of a model folder with one safetensors file, made from the GGUF model."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in gguf_files(_IN_GGUF.get(architecture, architecture)).items():
            (Path(folder) / name).write_bytes(data)
        artifact = open_artifact(Path(folder) / "m.gguf")
        tensors = {
            name: _values(ref.shape, index) for index, (name, ref) in enumerate(artifact.tensors.items())
        }
    tensors.pop(ROPE_FREQS, None)
    config = {
        "model_type": architecture,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        **options,
    }
    special = {"bos_token": TOKENS[0], "eos_token": TOKENS[1], "pad_token": {"content": TOKENS[0]}}
    tokenizer_config = {**special, "chat_template": [{"name": "default", "template": TEMPLATE}]}
    return {
        "model.safetensors": safetensors.numpy.save(tensors, {"format": "pt"}),
        "config.json": json.dumps(config).encode(),
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": json.dumps(tokenizer_config).encode(),
    }


def eight_bit_files(block: int = 0) -> dict[str, bytes]:
    """A model folder whose matrices are F8_E4M3, with a scale for each tensor, or for each block."""
    files = hf_files()
    header: dict[str, Any] = {}
    data = b""

    def add(name: str, dtype: str, shape: tuple[int, ...], stored: bytes) -> None:
        nonlocal data
        place_ = [len(data), len(data) + len(stored)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": place_}
        data += stored

    for name, values in safetensors.numpy.load(files["model.safetensors"]).items():
        if values.ndim == 1 or "embed" in name:
            add(name, "F32", values.shape, values.tobytes())
            continue
        add(name, "F8_E4M3", values.shape, ((values.view(np.uint32) >> 8).astype(np.uint8) & 0x77).tobytes())
        grid = tuple(-(-size // block) for size in values.shape) if block else (1,)
        scales = np.full(grid, 0.5, np.float32).tobytes()
        add(name + ("_scale_inv" if block else "_scale"), "F32", grid, scales)
    method: dict[str, Any] = {"quant_method": "fp8"}
    if block:
        method["weight_block_size"] = [block, block]
    text = json.dumps(header).encode()
    config = json.loads(files["config.json"]) | {"quantization_config": method}
    return files | {
        "model.safetensors": len(text).to_bytes(8, "little") + text + data,
        "config.json": json.dumps(config).encode(),
    }


def apr_file(architecture: str = "llama", *, coded: bool = False) -> bytes:
    """The bytes of an .apr model: plain, or in dtypes that are decoded as they are read."""
    files = hf_files(architecture)
    tensors = safetensors.numpy.load(files["model.safetensors"])
    config = json.loads(files["config.json"])
    metadata = {
        "architecture": architecture,
        "num_layers": 1,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "rope_type": 2,
        "tokenizer.model": "bpe",
        "tokenizer.pre_type": "gpt-2",
        "tokenizer.vocabulary": TOKENS,
        "tokenizer.token_type": TYPES,
        "tokenizer.merges": [" ".join(pair) for pair in MERGES],
        "tokenizer.bos_token_id": 0,
        "chat_template": TEMPLATE,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "intermediate_size": INNER,
        "head_dim": HEAD_DIM,
    }
    if coded:
        metadata |= {"huggingface_config": config, "tie_word_embeddings": True}
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    codes = (apr_bytes.apr_q4, apr_bytes.apr_q8, apr_bytes.f32)
    stored = {}
    for index, (name, values) in enumerate(tensors.items()):
        code = codes[index % 3] if coded and values.ndim == 2 and "embed" not in name else apr_bytes.f32
        stored[name] = code(values) if name != "lm_head.weight" else apr_bytes.f32(values)
    return apr_bytes.apr_bytes(metadata, stored)


def sharded_files(architecture: str = "llama") -> dict[str, bytes]:
    """The same in three shards with an index."""
    files = hf_files(architecture)
    tensors = safetensors.numpy.load(files.pop("model.safetensors"))
    weight_map = {}
    for number_, names in enumerate((list(tensors)[:3], list(tensors)[3:7], list(tensors)[7:])):
        shard = f"model-{number_ + 1:05d}-of-00003.safetensors"
        files[shard] = safetensors.numpy.save({name: tensors[name] for name in names}, {"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    files[INDEX] = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}).encode()
    return files


# --- Changes.


def _change_apr(random: Random, case: Case, other: Case) -> Case:
    return {"m.apr": change_apr(random, _data(case["m.apr"]), _data(other["m.apr"]))}


def _data(content: Content | None) -> bytes:
    return content if isinstance(content, bytes) else b""


def _change_gguf(random: Random, case: Case, other: Case) -> Case:
    names = sorted(name for name in case if isinstance(case[name], bytes))
    if len(names) > 1 and random.random() < 0.1:
        return {**case, random.choice(names): case[random.choice(names)]}
    name = random.choice(names)
    data = _data(case[name])
    spliced = _data(other.get(name)) or _data(next(iter(other.values())))
    changed = change_gguf(random, data) if random.random() < 0.7 else None
    return {**case, name: changed or change_bytes(random, data, spliced)}


def change_safetensors(random: Random, data: bytes, other: bytes) -> bytes:
    """One change of a safetensors file, mostly in the tree of its header."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    if random.random() < 0.2 or parsed(header) is None:
        return change_bytes(random, data, other)
    how = random.randrange(8)
    if how == 0:
        rest = change_bytes(random, rest, other)
    elif how == 1:
        length = number(random, len(header))
        return length.to_bytes(8, "little") + header + rest
    elif how == 2:
        header = _moved(random, header)
    elif how == 3:
        dtypes = (
            b"F64",
            b"F32",
            b"F16",
            b"BF16",
            b"F8_E4M3",
            b"F8_E5M2",
            b"F8_E8M0",
            b"F8_E4M3FNUZ",
            b"F4",
            b"I8",
        )
        dtypes += (b"F6_E2M3", b"BOOL", b"U8", b"I64", b"C64", b"Q4")
        header = header.replace(b'"F32"', b'"' + random.choice(dtypes) + b'"', random.choice((1, -1)))
    else:
        header = change_json(random, header, other)
    return len(header).to_bytes(8, "little") + header + rest


def _moved(random: Random, header: bytes) -> bytes:
    """Offsets and shapes that still look right: moved, swapped, or of another tensor."""
    document = parsed(header)
    entries = (
        [entry for _, entry in document if isinstance(entry, Pairs)] if isinstance(document, Pairs) else []
    )
    fields = [
        (entry, i)
        for entry in entries
        for i, (key, _) in enumerate(entry)
        if key in ("data_offsets", "shape")
    ]
    if not fields:
        return header
    entry, i = random.choice(fields)
    key, values = entry[i]
    if not isinstance(values, list) or not all(isinstance(v, int) for v in values):
        return header
    how = random.randrange(4)
    if how == 0:
        values = [v + random.choice((-4, 4, 1, 0)) for v in values]
    elif how == 1:
        values = [*values, random.choice(NUMBERS)] if key == "shape" else values[::-1]
    elif how == 2:
        other, j = random.choice(fields)
        values = other[j][1]
    else:
        values = [random.choice(NUMBERS) for _ in values]
    entry[i] = (key, values)
    return dumped(document).encode("utf-8", "surrogatepass")


def _change_folder(random: Random, case: Case, other: Case) -> Case:
    files = [name for name in case if isinstance(case[name], bytes)]
    if not files:
        return case
    weights = [name for name in files if name.endswith(".safetensors")]
    name = random.choice(weights) if weights and random.random() < 0.5 else random.choice(files)
    data, spliced = _data(case[name]), _data(other.get(name))
    changes = {".safetensors": change_safetensors, ".model": change_bytes}
    change = changes.get(Path(name).suffix, change_json)
    return {**case, name: change(random, data, spliced)}


def _change_index(random: Random, case: Case, other: Case) -> Case:
    how = random.randrange(8)
    changed = dict(case)
    names = sorted(case)
    if how == 0:
        targets = (*names, *TEXTS, "/dev/null", "/proc/self/mem", "/proc/self/environ", "..", "/", "nothing")
        changed[random.choice(names)] = Special("link", random.choice(targets).replace("\0", "") or ".")
    elif how == 1:
        changed[random.choice(names)] = Special(random.choice(("pipe", "folder")))
    elif how == 2:
        del changed[random.choice(names)]
    elif how == 3:
        changed[random.choice(names)] = case[random.choice(names)]
    elif how < 7 and isinstance(case.get(INDEX), bytes):
        changed[INDEX] = _change_weight_map(random, _data(case[INDEX]), names, _data(other.get(INDEX)))
    elif any(isinstance(content, bytes) for content in case.values()):
        return _change_folder(random, case, other)
    return changed or case


def _change_weight_map(random: Random, data: bytes, names: list[str], other: bytes) -> bytes:
    document = parsed(data)
    entries = dict(document).get("weight_map") if isinstance(document, Pairs) else None
    if random.random() < 0.4 or not isinstance(entries, Pairs) or not entries:
        return change_json(random, data, other)
    at = random.randrange(len(entries))
    spoilt = ("../", "/", "./", "sub/", "..\\", "//", "file://", "\0", ".", "~/", "%2e%2e/")
    shard = random.choice((*names, *TEXTS, *(prefix + random.choice(names) for prefix in spoilt)))
    entries[at] = (random.choice(entries)[0] if random.random() < 0.2 else entries[at][0], shard)
    return dumped(document).encode("utf-8", "surrogatepass")


def _gguf_seeds() -> list[Case]:
    plain = gguf_files()["m.gguf"]
    return [
        {"m.gguf": plain},
        {"m.gguf": plain[:4] + (2).to_bytes(4, "little") + plain[8:]},
        {"m.gguf": gguf_files(quantized=True)["m.gguf"]},
        {"m.gguf": gguf_files("qwen2")["m.gguf"]},
        {"m.gguf": gguf_files("qwen3", quantized=True)["m.gguf"]},
        {"m.gguf": gguf_files(sentencepiece=True)["m.gguf"]},
        {"m.gguf": gguf_files("gemma3", sentencepiece=True)["m.gguf"]},
        {"m.gguf": gguf_files("phi3", quantized=True)["m.gguf"]},
        gguf_files("qwen2", parts=3),
    ]


def _with_sentencepiece(files: dict[str, bytes]) -> Case:
    del files["tokenizer.json"]
    return files | {"tokenizer.model": sentencepiece_model()}


def _folder_seeds() -> list[Case]:
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    return [
        hf_files(),
        hf_files("llama", rope_scaling=llama3),
        hf_files("qwen2", sliding_window=16, use_sliding_window=False),
        hf_files("qwen3", rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6}),
        hf_files("mistral", sliding_window=16),
        eight_bit_files(),
        eight_bit_files(16),
        _with_sentencepiece(hf_files()),
        hf_files("gemma3_text", sliding_window=16, layer_types=["sliding_attention"], head_dim=HEAD_DIM),
        hf_files("phi3", pad_token_id=0, tie_word_embeddings=False),
    ]


def _first(case: Case) -> str:
    return next(iter(case))


def _folder(_case: Case) -> str:
    return "."


SUBJECTS: dict[str, Subject] = {
    "gguf": Subject(_gguf_seeds, _first, _change_gguf),
    "safetensors": Subject(_folder_seeds, _folder, _change_folder),
    "apr": Subject(
        lambda: [
            {"m.apr": apr_file()},
            {"m.apr": apr_file("qwen2")},
            {"m.apr": apr_file("qwen3", coded=True)},
        ],
        _first,
        _change_apr,
    ),
    "index": Subject(lambda: [sharded_files(), sharded_files("qwen2")], _folder, _change_index),
}
