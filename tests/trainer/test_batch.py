"""How a step's trajectories are cut into mini-batches."""

import numpy as np
import pytest
import torch

from fiberpo_megatron.environments import Outcome, Task, Turn
from fiberpo_megatron.fibration import WEIGHTINGS
from fiberpo_megatron.trainer.batch import mini_batches, token_weights
from fiberpo_megatron.trainer.loop import train
from fiberpo_megatron.trainer.settings import BatchConfig
from fiberpo_megatron.types import RolloutBatch
from tests.trainer.test_loop import training
from tests.trainer.toy import FakeEngine, FirstToken, SingleLayout, generator


@pytest.mark.parametrize(("groups", "sizes"), [(8, [2, 2, 2, 2]), (5, [1, 1, 2, 1]), (3, [1, 1, 1]), (1, [1])])
def test_no_mini_batch_is_empty_where_groups_were_dropped(groups: int, sizes: list[int]):
    rollouts = RolloutBatch.filled(
        tokens=np.arange(2 * groups),
        response_mask=np.tile([False, True], groups),
        lengths=np.full(groups, 2),
        groups=np.arange(groups),
    )
    parts = mini_batches(
        rollouts,
        np.ones(groups, np.float32),
        batch=BatchConfig(prompts=8, mini_batches=4, micro_batch_tokens=32),
        weighting="seq-mean",
        domains=1,
        layout=SingleLayout(),
        version=0,
    )
    assert [len(part.weights) for part in parts] == sizes
    assert all(part.weights.sum().item() == 1 for part in parts)
    tokens = torch.cat([micro.response_tokens for part in parts for micro in part.micro_batches])
    assert sorted(tokens.tolist()) == list(range(1, 2 * groups, 2))


def test_training_goes_on_with_the_groups_that_are_left():
    """Every task but two fails: of twelve groups two are left for the four mini-batches."""

    class Broken(FirstToken):
        def score(self, task: Task, turn: Turn) -> Outcome:
            if task.prompt not in ("<3>", "<8>"):
                raise ArithmeticError(task.prompt)
            return super().score(task, turn)

    engine = FakeEngine(seed=0)
    batch = {"prompts": 12, "samples_per_prompt": 8, "mini_batches": 4, "micro_batch_tokens": 64}
    run, memory = training(engine=engine, batch=batch, evaluation={"prompts": 0})
    run.source.generator = generator(engine, Broken(), on_failure="drop")
    train(run)
    assert memory.samples == [(0, 12), (1, 12), (2, 12)]
    assert all(np.isfinite(value) for value in memory.values("train", "gradient_norm"))
    assert max(memory.values("train", "gradient_norm")) > 0


def test_token_weights_of_every_kind():
    lengths = np.array([2, 5, 1])
    each = [token_weights(lengths, kind, 10.0).tolist() for kind in WEIGHTINGS]
    assert each[0] == pytest.approx([1 / 6, 1 / 15, 1 / 3]) and each[1] == pytest.approx([1 / 8] * 3)
    assert each[2] == pytest.approx([1 / 3] * 3) and each[3] == pytest.approx([1 / 30] * 3)
    with pytest.raises(ValueError, match="normaliser is None"):
        token_weights(lengths, "constant")
    with pytest.raises(ValueError, match="weighting is 'mean'; choose one of seq-mean"):
        token_weights(lengths, "mean")
