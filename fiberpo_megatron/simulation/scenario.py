"""This module draws what a simulated training is like, and what befalls it: both are functions of the seed alone."""

from dataclasses import dataclass, replace
from random import Random

from fiberpo_megatron.sources.handover import Partial


@dataclass(frozen=True)
class Scenario:
    """It is what a seed stands for."""

    seed: int
    steps: int
    prompts: int
    samples: int
    staleness: int
    partial: Partial
    chunk_tokens: int | None
    response_tokens: int
    turns: int
    """Turns of the policy in a trajectory; with 1 the environment only scores."""
    oversample: float | None
    """`batch.filter.oversample`; None: no filter."""
    refills: int
    save_every: int
    save_s: float
    """Time that a checkpoint takes to be written (s)."""
    train_s: float
    """Time of a pass over the tokens of a mini-batch (s)."""
    engines: int
    successors: bool
    """Whether the run starts engines again, at other addresses; else their owner does, at the same."""
    silence_s: float
    """`rollout.engine.silence_timeout_s`."""
    faults: int
    """Faults of engines, at most."""
    kills: int
    """Times at which the trainer is killed, at most."""
    machines: float
    """Share of the kills in which its machine is lost."""
    stops: int
    """SIGTERMs, at most."""
    full: int
    """Times at which the disk is full, at most."""

    def repeats(self, processes: int) -> bool:
        """Return whether the run is the one that nothing befell, bit for bit. What `drain` samples ahead has weights
        that are older than those with which a further process begins."""
        return self.staleness == 0 or (self.partial == "drain" and processes == 1)

    @property
    def quiet(self) -> "Scenario":
        """Return the same training, which nothing befalls."""
        return replace(self, faults=0, kills=0, stops=0, full=0)

    @classmethod
    def of(cls, seed: int) -> "Scenario":
        """Return the scenario of a seed."""
        draw = Random(f"scenario {seed}")
        staleness = draw.choice([0, 0, 1, 1, 2, 3])
        oversample = draw.choice([None, None, 1.0, 2.0])
        return cls(
            seed=seed,
            steps=draw.randint(2, 5),
            prompts=draw.randint(1, 3),
            samples=draw.randint(1 if oversample is None else 2, 3),
            staleness=staleness,
            partial=draw.choice(["drain", "retract", "segment", "segment"]),
            chunk_tokens=draw.choice([None, None, 1, 2, 3]),
            response_tokens=draw.randint(3, 8),
            turns=draw.choice([1, 1, 2]),
            oversample=oversample,
            refills=draw.randint(0, 3),
            save_every=draw.choice([1, 1, 2, 0]),
            save_s=draw.choice([0.0, 0.3, 2.0]),
            train_s=draw.choice([0.02, 0.2, 1.0]),
            engines=draw.randint(1, 3),
            successors=draw.random() < 0.5,
            silence_s=draw.choice([0.0, 2.0]),
            faults=draw.choice([0, 1, 2, 4, 8]),
            kills=draw.choice([0, 1, 1, 2, 3]),
            machines=draw.choice([0.0, 0.5, 1.0]),
            stops=draw.choice([0, 0, 1, 2]),
            full=draw.choice([0, 0, 0, 1]),
        )
