"""An engine that computes other log-probs than the trainer for the same weights is named, masked, or stops the run."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fiberpo_megatron.rollout.fleet import FixedFleet
from fiberpo_megatron.trainer.importance import EngineMismatch, weighed
from fiberpo_megatron.trainer.importance_settings import MismatchConfig
from fiberpo_megatron.trainer.loop import train
from fiberpo_megatron.types import Completion, TokenScores, concatenated_response_tokens
from tests.trainer.test_importance import VERSION, Step
from tests.trainer.test_loop import Memory, training
from tests.trainer.toy import VOCABULARY, FakeEngine, SingleLayout


class TwoEngines(FakeEngine):
    """Every second response comes from engine 1, whose logits are shifted; it records the probabilities that it had."""

    def __init__(self, shifts: tuple[float, float]) -> None:
        super().__init__(seed=0)
        self.shifts, self.calls = shifts, 0

    def _one(self, token: int, change: Any) -> Completion:
        engine, published = self.calls % 2, self.table
        self.calls += 1
        self.table = published + self.shifts[engine] * torch.eye(VOCABULARY)
        try:
            found = super()._one(token, change)
        finally:
            self.table = published
        return replace(found, engines=np.full(len(found.token_ids), engine, np.int16))


def run(shifts: tuple[float, float], live: bool = True, **mismatch: float) -> tuple[Memory, torch.Tensor]:
    """Records of one step, and what it made of the policy."""
    made, memory = training(
        engine=TwoEngines(shifts),
        trainer={"steps": 1},
        evaluation={"prompts": 0},
        algorithm={"mismatch": mismatch} if mismatch else {},
    )
    train(replace(made, live=live))
    policy: Any = made.policy
    return memory, policy.table.detach()


class Quarantine(FixedFleet):
    """It takes engines out as a fleet does; `engine` gives every response of an engine that is out to engine 0."""

    def __init__(self, engine: TwoEngines) -> None:
        self.engine, self.said = engine, list[dict[int, str]]()

    def quarantine(self, engines: Mapping[int, str]) -> None:
        self.said.append(dict(engines))
        for number in engines:
            shifts = list(self.engine.shifts)
            shifts[number] = shifts[0]
            self.engine.shifts = (shifts[0], shifts[1])


def test_a_shifted_engine_samples_nothing_after_the_step_that_shows_it():
    engine = TwoEngines((0.0, 4.0))
    made, memory = training(engine=engine, trainer={"steps": 3}, evaluation={"prompts": 0})
    source: Any = made.source
    source.fleet = Quarantine(engine)
    with pytest.warns(UserWarning, match="it samples no more"):
        train(replace(made, live=True))
    first, *later = source.fleet.said
    assert list(first) == [1] and first[1].startswith("step 0: engine 1 and the trainer differ by ")
    assert later == [{}, {}], "it was named once, and nothing of it came in later steps"
    steps = [record for kind, _, record in memory.records if kind == "train"]
    assert [record["mismatch/masked_engines"] for record in steps] == [1, 0, 0]


def test_a_shifted_engine_is_masked_in_the_step_that_shows_it():
    with pytest.warns(UserWarning) as found:
        memory, _ = run((0.0, 4.0))
    (text,) = [str(one.message) for one in found if "differ" in str(one.message)]
    assert text.startswith("step 0: engine 1 and the trainer differ by ") and "engine 0" not in text
    assert "above algorithm.mismatch.mask = 0.5 nats; all of its tokens of this step have weight 0" in text
    assert "the 144 tokens that it sampled" in text and "response token" in text and "token id" in text
    (_, _, record) = memory.records[-1]
    assert record["mismatch/masked_engines"] == 1.0
    assert record["importance/masked_share/engine/1"] == 1.0 and record["importance/masked_share/engine/0"] == 0.0
    assert record["importance/weight/engine/0"] == 1.0, 'the method is "off"'
    assert record["drift/engine/0"] < 1e-6 and record["drift/engine/1"] > 0.5
    assert record["token/weight"] == pytest.approx(1.0), "mu is counted again without the engine's tokens"


def test_engines_that_agree_are_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory, table = run((0.0, 0.0))
        _, without = run((0.0, 0.0), warn=0.0, mask=0.0)
    assert torch.equal(table, without)
    assert memory.values("train", "mismatch/masked_engines") == [0.0]


def test_rollouts_of_another_run_say_nothing_about_engines():
    """A replay calls the weights of another run by the same versions; the run goes on without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory, _ = run((4.0, 4.0), live=False)
    (_, _, record) = memory.records[-1]
    assert record["drift/engine/0"] > 0.5 and "mismatch/masked_engines" not in record


def test_between_the_limits_there_is_a_warning_alone():
    with pytest.warns(UserWarning, match="engine 1 .* above algorithm.mismatch.warn = 0.1 nats; compare what"):
        memory, table = run((0.0, 0.7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, without = run((0.0, 0.7), warn=0.0)
    assert torch.equal(table, without) and 0.1 < memory.values("train", "drift/engine/1")[0] < 0.5


def test_the_run_stops_above_the_last_limit_and_where_no_engine_is_left():
    with pytest.raises(EngineMismatch, match=r"^step 0: engine 1 and .*: above algorithm.mismatch.stop = 1 nats"):
        run((0.0, 4.0), stop=1.0)
    with pytest.raises(
        EngineMismatch, match="engine 0 and .*; step 0: engine 1 and .*: every engine is above"
    ) as found:
        run((3.0, 4.0))
    assert "algorithm.mismatch.mask = 0.5 nats, so that no token is left" in str(found.value)


def test_tokens_of_older_weights_are_no_mismatch():
    """Only what the trainer's own weights sampled is compared; a masked engine loses its older tokens as well."""
    step, layout = Step(spread=0.0), SingleLayout()
    older = step.rollouts.response_mask & (step.rollouts.weight_versions < VERSION)
    step.rollouts.rollout_log_probs[older] -= 5.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part = step.part(layout)
        found, metrics = step.weighed(part, layout, "off", mismatch=MismatchConfig())
    assert found is part and metrics["drift/mismatch"] == 0.0 and metrics["drift/staleness"] == pytest.approx(5.0)
    engine = step.rollouts.engines
    fresh = step.rollouts.response_mask & ~older & (engine == engine.max())
    step.rollouts.rollout_log_probs[fresh] -= 1.0
    with pytest.warns(UserWarning, match=f"engine {engine.max()} and the trainer differ by 1 nats"):
        found, _ = step.weighed(step.part(layout), layout, "off", mismatch=MismatchConfig())
    assert len(np.unique(engine[step.rollouts.response_mask])) > 1
    number = torch.from_numpy(engine)[concatenated_response_tokens(found.micro_batches)]
    assert torch.equal(found.weights == 0, number == engine.max())


def test_tokens_of_another_engine_are_enough_to_go_on():
    """The only engine whose mismatch is known is masked; the other one's tokens are all older."""
    step, layout = Step(spread=0.0), SingleLayout()
    rollouts = step.rollouts
    rollouts.weight_versions[:] = np.where(rollouts.engines == 0, VERSION, VERSION - 1)
    rollouts.rollout_log_probs[rollouts.engines == 0] -= 2.0
    with pytest.warns(UserWarning, match="engine 0 and the trainer differ by 2 nats"):
        found, _ = step.weighed(step.part(layout), layout, "off", mismatch=MismatchConfig())
    assert 0 < int((found.weights > 0).sum()) < len(found.weights)
    rollouts.engines[:] = 0
    with pytest.raises(EngineMismatch, match="no token is left"):
        step.weighed(step.part(layout), layout, "off", mismatch=MismatchConfig())


def test_the_worst_token_is_named():
    step, layout = Step(spread=0.0), SingleLayout()
    rollouts = step.rollouts
    rollouts.weight_versions[:] = VERSION
    trajectory = 4
    own = np.flatnonzero(np.repeat(rollouts.trajectories == trajectory, rollouts.lengths) & rollouts.response_mask)
    worst, engine = own[3], int(rollouts.engines[own[3]])
    rollouts.rollout_log_probs[worst] -= 200.0
    rollouts.weight_versions[own[0]], rollouts.engines[own[0]] = VERSION - 1, engine
    rollouts.rollout_log_probs[own[0]] -= 300.0
    with pytest.warns(UserWarning) as found:
        step.weighed(step.part(layout), layout, "off", mismatch=MismatchConfig(warn=0.01, mask=0))
    fresh = rollouts.response_mask & (rollouts.weight_versions == VERSION)
    tokens = int((fresh & (rollouts.engines == engine)).sum())
    (text,) = [str(one.message) for one in found]
    assert f"engine {engine} and the trainer differ by {200 / tokens:.3g} nats a token" in text
    assert f"of the {tokens} tokens" in text
    assert f"most (200) at response token 3 of trajectory 4 (token id {rollouts.tokens[worst]})" in text


def test_scores_of_a_caller_without_limits_are_compared_alone():
    """`optimise` without a weighing has the metrics, and weighs nothing."""
    step, layout = Step(), SingleLayout()
    part = step.part(layout)
    old = torch.from_numpy(step.old)[concatenated_response_tokens(part.micro_batches)]
    (found,), metrics = weighed(layout, [part], [TokenScores(old, torch.ones(len(old)))], None)
    assert found is part and metrics["entropy"] == 1.0 and metrics["rollout_diff/mean"] > 0.1
    assert not any(name.startswith(("importance", "mismatch")) for name in metrics)
