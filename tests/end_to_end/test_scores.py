"""A whole run whose trajectories are scored: by the very engine that samples them, so that every score is known."""

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_replay import assert_same_weights
from tests.end_to_end.test_training import records, run

ROUNDING = 1e-4
"""float32 in engine and trainer; log-probs were seen to differ by 5e-6."""


@pytest.mark.sglang
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_a_policy_that_is_its_own_teacher_has_no_divergence(model: Path, engine: Any, tmp_path: Path):
    """Two ranks; the engine has the policy's weights when it scores. The replay of the dump asks nobody."""
    urls = f'["{engine.url}"]'
    options = ["--trainer.steps", "2", "--evaluation.prompts", "0", "--weight_sync.method", "disk"]
    options += ["--algorithm.distillation.reward_weight", "1.0", "--algorithm.kl.coefficient", "0.1"]
    options += ["--algorithm.off_policy_mask.delta", "0.5", "--algorithm.supervised.coefficient", "0.1"]
    for section in ("algorithm.distillation.teacher", "algorithm.kl.servers"):
        options += [f"--{section}.urls", urls, f"--{section}.trust_vocabulary", "true"]
    done = run(model, tmp_path / "a", *options, "--rollout.engine.urls", urls, "--storage.dump", "true")
    assert done.returncode == 0, done.stderr
    steps = records(tmp_path / "a", "train")
    assert len(steps) == 2
    for record in steps:
        assert abs(record["distillation/reverse_kl"]) < ROUNDING and abs(record["kl/k1_mean"]) < ROUNDING
        assert record["distillation/unknown_share"] < 0.2, "the vocabulary's last token alone"
        assert record["scoring/teacher/trajectories"] == record["scoring/reference/trajectories"] == 32
        assert record["off_policy_mask/weight_share"] == 0.0 and 0.0 <= record["supervised/token_share"] <= 1.0
        assert record["gradient_norm"] > 0 and record["scoring/teacher/retries"] == 0

    nobody = [word.replace(engine.url, "http://127.0.0.1:9") for word in options]
    done = run(model, tmp_path / "b", *nobody, "--storage.replay", str(tmp_path / "a"))
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "a", tmp_path / "b")
