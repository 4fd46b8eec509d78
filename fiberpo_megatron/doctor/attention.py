"""This check tries one attention of Transformer Engine, and compares its cuDNN with torch's.

`python -m fiberpo_megatron.doctor.attention SHAPE` does it in a process of its own, which ends with its GPU memory, and
prints an `Answer`; `tried` starts it and reads the answer.
"""

import importlib.util
import json
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fiberpo_megatron.config import Config
from fiberpo_megatron.doctor.report import Finding
from fiberpo_megatron.mcore.cudnn import cudnn_folders, cudnn_versions, one_cudnn, prefer_torch_cudnn
from fiberpo_megatron.printable import printable
from fiberpo_megatron.subprocesses import exit_text, without_launcher

DEADLINE_S = 150.0
"""Importing Transformer Engine took 17 s on a machine with an H200; cuDNN compiles its first attention."""
ROW_TOKENS = (300, 212)
"""Lengths of the packed sequences that are tried."""
REASON_CHARACTERS = 300
_MARK = "fiberpo-attention "
_LOUD = {"NVTE_DEBUG": "1", "NVTE_DEBUG_LEVEL": "2"}
"""With these Transformer Engine logs why it does not take a backend."""
_MEMORY = "the whole matrix of scores is kept, which is slow and takes memory with the square of a sequence's length"


@dataclass(frozen=True)
class Shape:
    """Describes the attention of one rank."""

    heads: int = 8
    groups: int = 8
    """Key-value heads."""
    size: int = 128
    """Elements of a query and a key."""
    value_size: int = 128
    context: int = 1
    """Context-parallel ranks; the choice for them is asked for, and one rank's attention is run."""


@dataclass(frozen=True)
class Answer:
    """Holds what the process found."""

    torch_cudnn: str | None = None
    engine_cudnn: str | None = None
    folders: Sequence[str] = ()
    """Folders from which libraries of cuDNN were loaded."""
    backend: str = "none"
    """fused (cuDNN's), flash (flash-attention's), unfused, or none."""
    reasons: Sequence[str] = ()
    """Why others were not taken, as Transformer Engine logs it."""
    error: str = ""


def shape_of(config: Config | None) -> Shape:
    """Return the attention of the config's model on one rank; a usual one without a config or config.json."""
    if config is None or not (config.model.path / "config.json").is_file():
        return Shape(context=config.parallel.context if config else 1)
    from fiberpo_megatron.mcore.families import read_architecture, read_hf_config

    model = read_architecture(read_hf_config(config.model.path, config.model.family))
    parallel, size, value_size, groups = config.parallel, model.head_dim, model.head_dim, model.key_value_heads
    if (latent := model.latent) is not None:
        size, value_size, groups = latent.plain_size + latent.rotary_size, latent.value_size, model.heads
    heads = max(model.heads // parallel.tensor, 1)
    return Shape(heads, max(groups // parallel.tensor, 1), size, value_size, parallel.context)


def check(config: Config | None, ask: Callable[[Shape], Answer] | None = None) -> list[Finding]:
    """Return what a trial of packed, causal attention in bfloat16 says; nothing without Transformer Engine."""
    if importlib.util.find_spec("transformer_engine") is None:
        return []  # `gpu_software.transformer_engine` says so
    shape = shape_of(config)
    answer = (ask or tried)(shape)
    return [*_cudnn(answer), _attention(answer, shape)]


def _cudnn(answer: Answer) -> list[Finding]:
    if answer.torch_cudnn is None or answer.engine_cudnn is None:
        return []
    if answer.torch_cudnn == answer.engine_cudnn:
        return [Finding("cuDNN", "pass", f"{answer.torch_cudnn}, in torch and in Transformer Engine")]
    seen = f"torch runs {answer.torch_cudnn}, Transformer Engine {answer.engine_cudnn}, in one process"
    where = f"; libraries come from {', '.join(map(printable, answer.folders))}" if answer.folders else ""
    fix = one_cudnn()
    return [Finding("cuDNN", "fail", seen + where, fix[0].upper() + fix[1:])]


def _attention(answer: Answer, shape: Shape) -> Finding:
    heads = f"heads of {shape.size}" + (f" and {shape.value_size}" if shape.value_size != shape.size else "")
    what = f"{heads}, {shape.context} context-parallel ranks" if shape.context > 1 else heads
    reasons = "; ".join([*filter(None, [answer.error]), *answer.reasons]) or "Transformer Engine gives no reason"
    fix = "Have one cuDNN of the version that torch brings; NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 shows more"
    if answer.backend in ("fused", "flash"):
        return Finding("attention", "pass", f"{answer.backend}, for {what}")
    if answer.backend == "unfused" and shape.context == 1:
        return Finding("attention", "warn", f"unfused, for {what}: {_MEMORY} ({reasons})", fix)
    took = "Transformer Engine has no attention" if answer.backend == "none" else "only the unfused attention was found"
    return Finding("attention", "fail", f"{took} for {what} ({reasons})", fix)


def tried(shape: Shape, deadline_s: float = DEADLINE_S) -> Answer:
    """Run the trial in a process and return its answer. It never raises: what went wrong is in `error`."""
    command = [sys.executable, "-m", __name__, json.dumps(asdict(shape))]
    environment = without_launcher(os.environ) | _LOUD
    try:
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=deadline_s, check=False
        )
    except subprocess.TimeoutExpired:
        return Answer(error=f"the trial gave no answer within {deadline_s:g} s")
    except OSError as error:
        return Answer(error=f"the trial could not be started: {error}")
    for line in ended.stdout.splitlines():
        if line.startswith(_MARK):
            return Answer(**json.loads(line.removeprefix(_MARK)))
    last = (ended.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    return Answer(error=f"the trial ended with {exit_text(ended.returncode)}: {_short(last)}")


def _short(text: object) -> str:
    return printable(textwrap.shorten(str(text), REASON_CHARACTERS))


class _Reasons(logging.Handler):
    """Collects what Transformer Engine says against a backend."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        text = _short(record.getMessage())
        if text.startswith("Disabling"):
            self.found[text] = None


def attempt(shape: Shape) -> Answer:
    """Try the attention in this process, forwards and backwards; an exception becomes the answer's `error`."""
    answer, reasons = Answer(), _Reasons()
    logger = logging.getLogger("DotProductAttention")
    logger.addHandler(reasons)
    prefer_torch_cudnn(os.environ)
    try:
        import transformer_engine.pytorch  # noqa: F401

        versions = cudnn_versions()
        answer = replace(answer, torch_cudnn=versions.torch, engine_cudnn=versions.transformer_engine)
        answer = replace(answer, backend=_run(shape))
    except Exception as error:  # whatever it is belongs into the report
        answer = replace(answer, error=_short(f"{type(error).__name__}: {error}"))
    finally:
        logger.removeHandler(reasons)
    return replace(answer, folders=cudnn_folders(), reasons=list(reasons.found))


def _run(shape: Shape, device: str = "cuda") -> str:
    """Run the attention and return the name of its backend."""
    import torch
    from transformer_engine.pytorch import DotProductAttention
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention as choice
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    tokens, longest = sum(ROW_TOKENS), max(ROW_TOKENS)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device, "requires_grad": True}
    queries = torch.zeros(tokens, shape.heads, shape.size, **options)
    keys = torch.zeros(tokens, shape.groups, shape.size, **options)
    values = torch.zeros(tokens, shape.groups, shape.value_size, **options)
    bounds = torch.tensor([0, ROW_TOKENS[0], tokens], dtype=torch.int32, device=device)
    attention = DotProductAttention(
        shape.heads,
        (shape.size, shape.value_size),
        num_gqa_groups=shape.groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
    )
    out = attention(
        queries,
        keys,
        values,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    out.sum().backward()
    if device != "cpu":
        torch.cuda.synchronize()
    taken = choice._attention_backends
    if shape.context == 1:
        return _name(*(taken[f"use_{kind}_attention"] for kind in ("flash", "fused", "unfused")))
    params = replace(taken["attention_params"], context_parallel=True, cp_comm_type="p2p")
    if hasattr(params, "cp_size"):
        params = replace(params, cp_size=shape.context)
    flash, _, fused, _, unfused = utils.get_attention_backend(params)[:5]
    return _name(flash, fused, unfused)


def _name(flash: Any, fused: Any, unfused: Any) -> str:
    return "flash" if flash else "fused" if fused else "unfused" if unfused else "none"


def main(words: Sequence[str]) -> int:
    """Print the answer for the shape that is given as JSON."""
    print(_MARK + json.dumps(asdict(attempt(Shape(**json.loads(words[0]))))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
