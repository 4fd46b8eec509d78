"""Defines how a family's weight table is written, and how the names in it are matched.

A table says which Hugging Face tensors each parameter of the Megatron model is made of. Megatron names are those of
the local layer spec with global numbers in place of `{layer}` and `{expert}`; `canonical_name` brings the names of the
Transformer Engine spec to this form.
"""

import re
import sys
from dataclasses import dataclass, replace
from functools import lru_cache

from fiberpo_megatron.mcore.families.architecture import Architecture
from fiberpo_megatron.mcore.families.transforms import Transform, Vocabulary

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT = "output_layer.weight"
HF_LAYER = "model.layers.{layer}."
"""The start of the names of a layer's tensors in most families."""
_LAYER = "decoder.layers.{layer}."


@lru_cache(maxsize=1024)
def name_pattern(template: str) -> re.Pattern[str]:
    """Return the regular expression of a name with `{layer}` and `{expert}`."""
    escaped = re.escape(template).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)")
    return re.compile(escaped)


@dataclass(frozen=True)
class Match:
    """Holds the numbers that a name has where its template has `{layer}` and `{expert}`."""

    layer: int | None
    expert: int | None


def match_name(template: str, name: str) -> Match | None:
    """Return the numbers in `name`, or None when it does not fit the template."""
    found = name_pattern(template).fullmatch(name)
    if found is None:
        return None
    numbers = {key: int(value) for key, value in found.groupdict().items()}
    return Match(numbers.get("layer"), numbers.get("expert"))


def fill(template: str, match: Match) -> str:
    """Return `template` with the numbers of the match."""
    return template.format(layer=match.layer, expert=match.expert)


@dataclass(frozen=True)
class Rule:
    """Says what one kind of parameter is made of."""

    megatron: str
    """Name of the parameter, with `{layer}` and `{expert}`."""
    hf: tuple[str, ...]
    """Names of the Hugging Face tensors, in the order that the transform expects."""
    transform: Transform
    exported: bool = True
    """False for a copy of another parameter (tied output weights on the last pipeline stage)."""


def layer_rule(megatron: str, hf: str | tuple[str, ...], transform: Transform, hf_layer: str = HF_LAYER) -> Rule:
    """Return the rule of a parameter of a layer.

    `megatron` is the name inside the layer, `hf` the name or names inside the layer of the Hugging Face model, whose
    names start with `hf_layer`.
    """
    names = (hf,) if isinstance(hf, str) else hf
    return Rule(_LAYER + megatron, tuple(hf_layer + name for name in names), transform)


@dataclass(frozen=True)
class FusedExperts:
    """Describes expert weights of a layer that files may store in one tensor [experts, rows, columns]."""

    hf: str
    """Name of the stacked tensor, with `{layer}`."""
    parts: tuple[str, ...]
    """The names of a single expert, with `{layer}` and `{expert}`; their rows lie below each other in the tensor."""


@dataclass(frozen=True)
class WeightTable:
    """Lists the rules of all parameters that a model of the family may have."""

    rules: tuple[Rule, ...]
    """In the order in which the tensors of one layer are exported."""
    fused_experts: tuple[FusedExperts, ...] = ()
    ignored: str = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    """Regular expression of the tensors in a model's files that carry no weights."""
    predicted: str | None = None
    """Start of the names of a multi-token prediction layer, with `{layer}`; None when the family has none. These layers
    are numbered behind the model's own and are neither loaded nor exported."""
    tied_output: str | None = None
    """Name under which files may store a tied output layer once more; `for_model` sets it."""

    def rule_of(self, name: str) -> tuple[Rule, Match] | None:
        """Return the rule of a canonical Megatron name with the name's numbers, or None when no rule fits."""
        for rule in self.rules:
            match = match_name(rule.megatron, name)
            if match is not None:
                return rule, match
        return None

    def position(self, name: str) -> tuple[int, int, int]:
        """Return the sort key of a canonical name: embedding, layers (experts last), final norm, output layer."""
        described = self.rule_of(name)
        assert described is not None, name
        rule, match = described
        outside = -1 if rule.megatron == EMBEDDING else sys.maxsize
        layer = outside if match.layer is None else match.layer
        return layer, -1 if match.expert is None else match.expert, self.rules.index(rule)

    def for_model(self, architecture: Architecture) -> "WeightTable":
        """Return the table of one model.

        A tied output layer becomes a copy of the embedding, and the model's multi-token prediction layers are ignored.
        """
        ignored = self.ignored
        if architecture.predict_layers and self.predicted:
            numbers = "|".join(str(architecture.layers + i) for i in range(architecture.predict_layers))
            start = re.escape(self.predicted).replace(r"\{layer\}", f"({numbers})")
            ignored = rf"{ignored}|{start}.*"
        if not architecture.tied_embeddings:
            return replace(self, ignored=ignored)
        hf = {rule.megatron: rule.hf for rule in self.rules}
        tied = Rule(OUTPUT, hf[EMBEDDING], Vocabulary(), exported=False)
        rules = tuple(tied if rule.megatron == OUTPUT else rule for rule in self.rules)
        return replace(self, rules=rules, ignored=ignored, tied_output=hf[OUTPUT][0])


_TE_NAMES = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_weight$"), "input_layernorm.weight"),
    (re.compile(r"self_attention\.linear_(q|kv)_up_proj\.layer_norm_weight$"), r"self_attention.\1_layernorm.weight"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_weight$"), "pre_mlp_layernorm.weight"),
    (re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$"), r"mlp.experts.\3.\1.\2"),
    (re.compile(r"mlp\.experts\.local_experts\.(\d+)\."), r"mlp.experts.\1."),
)


def canonical_name(name: str, layer: int | None, first_expert: int) -> str:
    """Return the name that the tables use for a module's parameter.

    `layer` is the global number of the layer that the parameter belongs to (None outside layers), `first_expert` the
    global number of this rank's first expert.
    """
    for pattern, replacement in _TE_NAMES:
        name = pattern.sub(replacement, name)
    if layer is not None:
        name = re.sub(r"^decoder\.layers\.\d+\.", f"decoder.layers.{layer}.", name)
    return re.sub(r"mlp\.experts\.(\d+)\.", lambda m: f"mlp.experts.{int(m[1]) + first_expert}.", name)
