"""This module trains a toy policy with all else real: the loop, recorder and sinks, the lock, checkpoint folders,
rollouts on disk, environments in their workers, and the engines' client and publisher with a toy engine at a socket.

`Run` makes the same parts around a Megatron model (`fiberpo_megatron/trainer/run.py`).
"""

import json
import runpy
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fiberpo_megatron import durable
from fiberpo_megatron.config import Config, dump_config
from fiberpo_megatron.data.curriculum import build_prompts
from fiberpo_megatron.fibration import build_objective
from fiberpo_megatron.interfaces import Recorder
from fiberpo_megatron.mcore.checkpoint.folders import (
    DamagedCheckpoint,
    Description,
    damaged_files,
    describe,
    mark_all,
    partial_folder,
    step_of,
)
from fiberpo_megatron.run_lock import RunLockLost, take
from fiberpo_megatron.sources.build import SourceParts, rollout_source
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.trainer.loop import Training, train
from fiberpo_megatron.trainer.plugin_checks import make_advantage
from fiberpo_megatron.trainer.recorder import RunCheckpoints, open_recorder, restore
from fiberpo_megatron.trainer.stop import never
from fiberpo_megatron.trainer.tasks import Tasks, start_tasks
from fiberpo_megatron.trainer.token_records import token_records
from tests.trainer.toy import SingleLayout, TablePolicy, Written

HERE = Path(__file__).parent
DEMO = runpy.run_path(str(HERE.parents[1] / "examples/demo/make_model.py"))
VOCABULARY: int = len(DEMO["VOCABULARY"])
TENSORS = "table.pt"
Wrap = Callable[[Recorder], Recorder]


class ToyLayout(SingleLayout):
    device = torch.device("cpu")


class FolderPolicy(TablePolicy):
    """This is a table of logits whose checkpoints are folders like those of `mcore.checkpoint`."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__(learning_rate)
        self.layout = ToyLayout()
        digits = [index for index, token in enumerate(DEMO["VOCABULARY"]) if token.isdigit()]
        table = torch.zeros(VOCABULARY, VOCABULARY)
        table[:, digits] = 4.0  # so that right answers are sampled from the first step on
        self.table = table.requires_grad_()

    def save(self, folder: str, state: Mapping[str, object]) -> None:
        final = Path(folder)
        partial = partial_folder(final)
        with durable.explained(final):
            if partial.exists():  # of a save that failed
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            with (partial / TENSORS).open("wb") as file:
                torch.save(self.table.detach(), file)
            durable.sync_tree(partial)
            Description(step_of(final), {}, {}, {}, state, mark_all(partial)).write(partial)
        durable.rename(partial, final)

    def begin_save(self, folder: str, state: Mapping[str, object]) -> Written:
        self.save(folder, state)
        return Written()

    def load(self, folder: str) -> dict[str, object]:
        description = describe(folder)
        damage = damaged_files(Path(folder), description)
        if damage:
            raise DamagedCheckpoint(damage)
        with torch.no_grad():
            self.table.copy_(torch.load(Path(folder) / TENSORS, weights_only=True))
        return dict(description.state)


def toy_model(folder: Path) -> Path:
    """Write the configuration and the tokenizer of the demo's model into a folder."""
    DEMO["write_model"](folder)
    return folder


def toy_config(folder: Path, model: Path, url: str, steps: int, **sections: dict[str, Any]) -> Config:
    """Return the settings of a small run; entries of `sections` replace or extend those below."""
    path = HERE / "environment.py"
    environments = [
        {"name": "next", "use": f"{path}:NextDigit", "weight": 2.0, "on_failure": "zero", "workers": 1},
        {"name": "turns", "use": f"{path}:TwoTurns", "workers": 1},
    ]
    settings: dict[str, Any] = {
        "run": {"folder": folder},
        "model": {"path": model},
        "environments": environments,
        "trainer": {"steps": steps},
        "data": {"curriculum": "adaptive"},
        "batch": {"prompts": 1, "samples_per_prompt": 2, "micro_batch_tokens": 64},
        "rollout": {"max_response_tokens": 4, "engine": {"urls": [url]}},
        "weight_sync": {"method": "disk", "verify_every": 5},
        "evaluation": {"prompts": 2, "every_steps": 50},
        "checkpoint": {"every_steps": 10, "keep": 2, "keep_best_metric": "eval/accuracy"},
        "telemetry": {"rollout_steps_kept": 20, "trace_steps_kept": 20},
    }
    for name, values in sections.items():
        settings[name] = settings.get(name, {}) | values if isinstance(values, dict) else values
    return Config.model_validate(settings)


def lost(loss: RunLockLost) -> None:
    """End the process, because another run has taken over the folder."""
    raise SystemExit(str(loss))


def run_toy(
    config: Config,
    *,
    resume: bool = False,
    stop: Callable[[], bool] = never,
    wrap: Wrap = lambda recorder: recorder,
    workers: Tasks | None = None,
) -> FolderPolicy:
    """Train the toy policy to the end, as `Run.train` does, and return it.

    `wrap` stands before the recorder. `workers`: environments that run already, so that many runs can share them.
    """
    hf_config = json.loads((config.model.path / "config.json").read_text())
    policy, timers = FolderPolicy(20.0), PhaseTimers()
    with ExitStack() as stack:
        if workers is None:
            tasks = stack.enter_context(start_tasks(config, hf_config, policy.layout))
        else:
            domains = [fact.domain(settings) for fact, settings in zip(workers.facts, config.environments)]
            tasks = replace(workers, prompts=build_prompts(config.data, domains))
        lock = stack.enter_context(take(config.run.folder, "train", lost, watch_s=5.0))
        checkpoints = RunCheckpoints(config.run.folder / "checkpoints", config.checkpoint, lock)
        with durable.replaced(config.run.folder / "config.toml", text=True) as file:
            file.write(dump_config(config))
        state = restore(policy, checkpoints.folder, print) if resume else {}
        start = int(state.get("step", 0))
        if state:
            tasks.prompts.restore(state["prompts"])
        recorder = stack.enter_context(
            open_recorder(config, policy.layout, tasks.all_names, start, config.trainer.steps, ("train", "eval"), "toy")
        )
        parts = SourceParts(
            config=config,
            hf_config=hf_config,
            layout=policy.layout,  # type: ignore[arg-type]
            sets=tasks.sets,
            prompts=tasks.prompts,
            encoder=tasks.encoder,
            environments=tasks.environments,
            timers=timers,
            stop=stop,
            registry=None,
            say=print,
        )
        source = stack.enter_context(rollout_source(parts, policy, recorder, start, resume))
        training = Training(
            policy=policy,
            source=source,
            objective=build_objective("fiberpo"),
            advantage=make_advantage(config, build_objective("fiberpo")),
            recorder=wrap(recorder),
            checkpoints=checkpoints,
            timers=timers,
            batch=config.batch,
            algorithm=config.algorithm,
            temperature=config.rollout.temperature,
            steps=config.trainer.steps,
            evaluate_every=config.evaluation.every_steps,
            save_every=config.checkpoint.every_steps,
            stop=stop,
            records=token_records(config, tasks.encoder.pieces, tasks.names),
        )
        train(training, start)
    return policy
