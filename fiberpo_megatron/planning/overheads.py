"""This module holds the constant costs of a step beside arithmetic and bytes; only a calibration measures them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Overheads:
    """These are constant costs in seconds; docs/planning.md (Calibration) says how each is measured.

    A GPU hides most of them behind its work, so that they are 0 without a calibration. On a CPU, and for a tiny model,
    they are most of a step.
    """

    pass_s: float = 0.0
    """A forward pass over a micro-batch costs so much outside of the layers: schedule, embedding, log-probs."""
    layer_s: float = 0.0
    """A layer costs so much in such a pass."""
    backward_pass_s: float = 0.0
    """A backward pass over a micro-batch costs so much outside of the layers."""
    backward_layer_s: float = 0.0
    """A layer costs so much in such a pass."""
    optimizer_s: float = 0.0
    """A step of the optimizer costs so much beside its layers."""
    optimizer_layer_s: float = 0.0
    """A layer's parameters cost so much in such a step."""
    generate_s: float = 0.0
    """A generation costs so much once: the network and the first request."""
    response_s: float = 0.0
    """A response costs so much beside its tokens: request and answer as JSON, its place in the engine, its score."""
    publish_s: float = 0.0
    """The control calls of a publication cost so much."""
    publish_layer_s: float = 0.0
    """The export of a layer's tensors costs so much."""
    checkpoint_s: float = 0.0
    """A checkpoint costs so much beside its layers, until it is complete."""
    checkpoint_layer_s: float = 0.0
    """A layer's tensors cost so much in a checkpoint."""
