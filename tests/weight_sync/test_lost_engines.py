"""Engines that are lost while several training ranks publish: who is named, how soon, and what the others hold."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from fiberpo_megatron.certify.processes import run_ranks
from tests.weight_sync.lost_engines import LOST, TIMEOUT_S, publish_and_lose, weights

ENDED = "ended the run"
FAULTS = {
    "dies": ("EngineUnreachable", 4.0, True),
    "its scheduler dies": ("EngineUnreachable", 6.0, True),
    "rank 1 loses it": ("EngineUnreachable", 6.0, True),
    "hangs": ("EngineTimeout", TIMEOUT_S + 4.0, True),
    "refuses": ("EngineRefused", 4.0, ENDED),
}
"""For each fault the error of rank 0, the seconds within which every rank has one, and what becomes of the version.

A refusal ends the publication: it says that something is wrong with what was published.
"""


@pytest.fixture(scope="module")
def ranks(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    model = tmp_path_factory.mktemp("lost") / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "x"}')
    save_file(weights(0), model / "model.safetensors")
    return run_ranks(2, publish_and_lose, list(FAULTS), checkpoint, model, timeout_s=120)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_that_is_lost_in_a_round_is_named_and_the_others_get_the_weights(
    fault: str, ranks: list[dict[str, Any]]
):
    kind, within_s, second = FAULTS[fault]
    for seen in (of_rank[fault] for of_rank in ranks):
        assert [seen["first"], seen["second"], seen["third"]] == [True, second, True], seen
        assert len(seen["errors"]) == 1 and max(seen["seconds"]) < within_s, seen
        # one that says nothing cannot leave a group
        assert seen["engines"] == [0] and seen["left"] <= (
            {LOST} if fault in ("hangs", "rank 1 loses it") else set()
        ), seen
    error = ranks[0][fault]["errors"][0]
    assert error.startswith(f"{kind}: engine http://{LOST}: "), error


def test_a_rank_that_fails_does_not_leave_the_others_in_the_broadcasts_of_a_gpu(ranks: list[dict[str, Any]]):
    """There is no way out of one of NCCL's before its timeout."""
    (_, *of_0, last_0), (_, *of_1, last_1) = (of_rank["shares"] for of_rank in ranks)
    assert of_0 == [f"RankFailed: publishing weights {n}: round 2 of 3: it failed on rank 1, whose own message says why"
                    for n in (1, 2)]  # fmt: skip
    assert of_1[0] == "FloatingPointError: the policy's own failure"
    assert of_1[1].startswith("ValueError: the policy announced") and last_0 == last_1 == ""
