"""Builds a run from its config: the real collaborators of the loop, in the order in which they can fail."""

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fiberpo_megatron.config import Config, dump_config
from fiberpo_megatron.data.curriculum import build_prompts
from fiberpo_megatron.data.prompts import PromptSets
from fiberpo_megatron.data.tokenizer import Tokenizer, load_tokenizer, response_text, stop_token_ids, tokens_with
from fiberpo_megatron.engines.api_key import new_key, read_key
from fiberpo_megatron.engines.client import EngineAddress, Sampling
from fiberpo_megatron.engines.registry import SLACK_S, Registry
from fiberpo_megatron.engines.servers import check_reachable, engines
from fiberpo_megatron.engines.settings import EngineConfig
from fiberpo_megatron.mcore.checkpoint import CheckpointError, DamagedCheckpoint, complete_steps
from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.mcore.parallel.heartbeat import heartbeat
from fiberpo_megatron.mcore.parallel.layout import ParallelLayout, start_layout, stop_layout
from fiberpo_megatron.mcore.policy import MegatronPolicy, build_policy
from fiberpo_megatron.mcore.weights import save_hf
from fiberpo_megatron.rendezvous import master_address
from fiberpo_megatron.rewards import RetryEnvironment, build_reward
from fiberpo_megatron.rollout.conversation import Dialogue
from fiberpo_megatron.rollout.generate import EngineSampler
from fiberpo_megatron.telemetry.console import Console
from fiberpo_megatron.telemetry.gpu import GpuMonitor
from fiberpo_megatron.telemetry.metrics import Kind
from fiberpo_megatron.telemetry.sinks import Sinks, open_sinks
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.trainer.generation import Generator
from fiberpo_megatron.trainer.loop import Training, evaluate, generate, publish, train
from fiberpo_megatron.trainer.memory import OwnDevices, SharedDevices
from fiberpo_megatron.trainer.preflight import make_objective
from fiberpo_megatron.trainer.recorder import RunCheckpoints, RunRecorder
from fiberpo_megatron.trainer.sft import fine_tune
from fiberpo_megatron.trainer.stop import Stopped, StopRequest, leave
from fiberpo_megatron.trainer.stored import DUMP, StoredRollouts
from fiberpo_megatron.trainer.together import together
from fiberpo_megatron.weight_sync.base import Publisher
from fiberpo_megatron.weight_sync.disk import DiskPublisher
from fiberpo_megatron.weight_sync.distributed import DistributedPublisher


@dataclass(frozen=True)
class Base:
    """What every command needs."""

    config: Config
    hf_config: Mapping[str, Any]
    layout: ParallelLayout
    tokenizer: Tokenizer
    prompts: PromptSets
    checkpoints: RunCheckpoints
    stop: StopRequest
    registry: Registry | None
    timers: PhaseTimers

    def say(self, text: str) -> None:
        """One line for the person at the terminal."""
        if self.layout.is_logger:
            print(text, flush=True)


def run_train(config: Config, resume: bool, stop: StopRequest, registry: Registry | None = None) -> None:
    """`fiberpo train`: reinforcement learning from `model.path`, or from the newest checkpoint.

    `registry`: the engines were started by the job and register there.
    """
    with _base(config, stop, registry) as base, ExitStack() as stack:
        policy = build_policy(config, base.hf_config, base.layout)
        state = _restore(base, policy, resume)
        start = int(state.get("step", 0))
        if state:
            base.prompts.restore(state["prompts"])
        run = stack.enter_context(_training(base, policy, ("train", "eval"), start, resume))
        train(run, start)
        _finish(base, policy)


def run_eval(config: Config, stop: StopRequest) -> None:
    """`fiberpo eval`: sampled accuracy of `model.path` on the held-out prompts."""
    with _base(config, stop) as base, ExitStack() as stack:
        policy = build_policy(config, base.hf_config, base.layout)
        run = stack.enter_context(_training(base, policy, ()))
        publish(run, 0, probe=None)
        evaluate(run, 0)


def run_dump(config: Config, resume: bool, stop: StopRequest) -> None:
    """`fiberpo dump`: the rollouts of `trainer.steps` training steps with the weights of `model.path`, on disk."""
    with _base(config, stop) as base, ExitStack() as stack:
        policy = build_policy(config, base.hf_config, base.layout)
        run = stack.enter_context(_training(base, policy, (), resume=resume))
        publish(run, 0, probe=None)
        for step in range(config.trainer.steps):
            if base.layout.any_rank(stop()):
                raise Stopped(step)
            rollouts = generate(run, step, 0)
            if rollouts is None:
                raise Stopped(step)
            base.say(f"step {step}: {len(rollouts.lengths)} trajectories, mean reward {rollouts.rewards.mean():.3f}")
        base.say(f"Rollouts: {config.run.folder / DUMP}")


def run_sft(config: Config, resume: bool, stop: StopRequest) -> None:
    """`fiberpo sft`: supervised warm-up; leaves a Hugging Face folder for `fiberpo train`."""
    with _base(config, stop) as base, ExitStack() as stack:
        policy = build_policy(config, base.hf_config, base.layout, total_steps=config.sft.steps)
        start = int(_restore(base, policy, resume).get("step", 0))
        recorder = stack.enter_context(_recorder(base, start, config.sft.steps, ("sft",), "warm-up"))
        fine_tune(config, policy, base.prompts, recorder, base.checkpoints, base.timers, start, stop)
        _finish(base, policy)


@contextmanager
def _base(config: Config, stop: StopRequest, registry: Registry | None = None) -> Iterator[Base]:
    hf_config = json.loads((config.model.path / "config.json").read_text())
    layout, timers = start_layout(hf_config, config.parallel, config.run), PhaseTimers()
    with ExitStack() as stack:
        stack.callback(stop_layout)
        patience = config.run.heartbeat_timeout_s
        stack.enter_context(heartbeat(layout.rank, layout.world_size, patience, timers.phase, leave))
        tokenizer = load_tokenizer(config.model.path)
        prompts = build_prompts(config.data, tokenizer)
        checkpoints = RunCheckpoints(config.run.folder / "checkpoints", config.checkpoint)
        if layout.rank == 0:
            config.run.folder.mkdir(parents=True, exist_ok=True)
            (config.run.folder / "config.toml").write_text(dump_config(config))
        yield Base(config, hf_config, layout, tokenizer, prompts, checkpoints, stop, registry, timers)


def _restore(base: Base, policy: MegatronPolicy, resume: bool) -> dict[str, Any]:
    """The state of the newest whole checkpoint after loading it; empty at the beginning.

    A damaged checkpoint is told and passed over; CheckpointError when all are.
    """
    if not resume:
        return {}
    root = base.checkpoints.folder
    found = [str(folder) for folder in reversed(complete_steps(root))] if base.layout.rank == 0 else None
    paths = json.loads(base.layout.share_text(json.dumps(found) if found is not None else None))
    for path in paths:
        try:
            state = policy.load(path)
        except DamagedCheckpoint as error:
            base.say(f"WARNING: {error}")
            continue
        base.say(f"Resumed from {path}")
        return state
    if paths:
        raise CheckpointError(
            f"none of the {len(paths)} checkpoints in {root} is whole; restore one from a backup, or start again "
            "without --resume in another run folder"
        )
    base.say(f"No complete checkpoint in {root}: starting from the beginning")
    return {}


@contextmanager
def _training(
    base: Base, policy: MegatronPolicy, kinds: Sequence[Kind], start: int = 0, resume: bool = True
) -> Iterator[Training]:
    """Engines, recorder, stored rollouts and objective around a policy; without engines where rollouts are replayed."""
    config, replay = base.config, base.config.rollouts.replay
    with ExitStack() as stack:
        rollouts = StoredRollouts(config, int(base.hf_config["vocab_size"]), base.layout, start, resume)
        if replay is not None:
            base.say(f"Rollouts come from {replay}: no engine, nothing is published, no held-out evaluation")
        shared = SharedDevices(policy) if config.rollout.engine.colocated and replay is None else None
        generator, publisher = (None, None) if replay else stack.enter_context(_engine_side(base, shared))
        recorder = stack.enter_context(_recorder(base, start, config.trainer.steps, kinds, "training"))
        yield Training(
            config=config,
            policy=policy,
            prompts=base.prompts,
            generator=generator,
            objective=make_objective(config),
            publisher=publisher,
            recorder=recorder,
            checkpoints=base.checkpoints,
            timers=base.timers,
            rollouts=rollouts,
            stop=base.stop,
            turns=shared or OwnDevices(),
        )


@contextmanager
def _engine_side(base: Base, shared: SharedDevices | None) -> Iterator[tuple[Generator, Publisher]]:
    """Engines, and what samples from them, scores what they say and publishes to them."""
    config = base.config
    with ExitStack() as stack:
        addresses = _engines(base, stack)
        vocabulary, stop = int(base.hf_config["vocab_size"]), config.rollout.stop
        stop_ids = (*stop_token_ids(config.model.path, base.tokenizer), *base.prompts.ends_of_turn)
        sampler = stack.enter_context(
            EngineSampler(
                addresses,
                Sampling(
                    max_response_tokens=config.rollout.max_response_tokens,
                    stop_token_ids=(*stop_ids, *tokens_with(base.tokenizer, stop, vocabulary)),
                    temperature=config.rollout.temperature,
                    top_p=config.rollout.top_p,
                    top_k=config.rollout.top_k,
                ),
                max_concurrent=config.rollout.max_concurrent_requests,
                timeout_s=config.rollout.engine.request_timeout_s,
                vocabulary=vocabulary,
                routed_experts=_routing_shape(base.hf_config) if config.needs_rollout_routing else None,
            )
        )
        if shared is not None:
            with together(base.layout, "checking the engines"):
                if base.layout.rank == 0 and base.layout.device.type == "cuda":
                    sampler.require_memory_saver()
            shared.attach(sampler)
        reward = build_reward(config.data, config.run.seed)
        stack.callback(reward.close)
        publisher = stack.enter_context(_publisher(base, addresses))
        decode = partial(response_text, base.tokenizer, stop_ids=stop_ids, stop=stop)
        dialogue = Dialogue(RetryEnvironment(config.data.tasks, reward), base.prompts.continuation)
        yield Generator(sampler, decode, reward, config.run.seed, dialogue), publisher


def _routing_shape(hf_config: Mapping[str, Any]) -> tuple[int, int]:
    """(MoE layers, top_k) of the engine's answers."""
    architecture = read_architecture(hf_config)
    if architecture.experts is None:
        raise ValueError(f"routing was asked for, but a {architecture.model_type} model has no experts")
    dense = list(architecture.experts.dense_layers)
    if dense:
        raise ValueError(
            f"routing was asked of the engine, but layers {dense} of the model have no experts, and what an "
            "engine reports for them is not told apart; set rollout.return_routing = false and "
            'algorithm.expert_routing and routing_replay to anything but "rollout"'
        )
    return architecture.layers, architecture.experts.per_token


def _engines(base: Base, stack: ExitStack) -> list[EngineAddress]:
    """Addresses on every rank; rank 0 waits for those of the job, or starts servers when none are given."""
    config, layout = base.config, base.layout
    folder = config.run.folder / "engines"
    if base.registry is not None:
        base.say(f"Waiting for the engines of {', '.join(base.registry.hosts())} ...")
    elif not config.rollout.engine.urls:
        base.say(f"Starting SGLang (log: {folder}/engine_0.log) ...")
    addresses: list[EngineAddress] = []
    with together(layout, "starting the rollout engines"):
        if layout.rank == 0 and base.registry is not None:
            addresses = base.registry.wait(config.rollout.engine.start_timeout_s + SLACK_S)
            for address in addresses:
                check_reachable(address)
        elif layout.rank == 0:
            key = _api_key(config.rollout.engine)
            local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", layout.world_size))
            first_gpu = _first_engine_gpu(config.rollout.engine, local_ranks)
            addresses = stack.enter_context(
                engines(
                    config.rollout.engine,
                    config.model.path,
                    folder,
                    dtype=config.model.dtype,
                    seed=config.run.seed,
                    host="127.0.0.1" if local_ranks == layout.world_size else master_address() or socket.gethostname(),
                    routed_experts=config.needs_rollout_routing,
                    first_gpu=first_gpu,
                    api_key=key,
                )
            )
    shared = layout.share_text(json.dumps([[a.url, a.api_key] for a in addresses]) if layout.rank == 0 else None)
    return addresses or [EngineAddress(url, api_key=key) for url, key in json.loads(shared)]


def _api_key(engine: EngineConfig) -> str | None:
    """Of given servers: what their file says, if anything; else a fresh one."""
    if engine.api_key_file is not None:
        return read_key(engine.api_key_file)
    return None if engine.urls else new_key()


def _first_engine_gpu(engine: EngineConfig, local_ranks: int) -> int:
    """Index of the first GPU of the engines that are started here: on the training ranks' GPUs, or behind them."""
    if engine.colocated or engine.urls or not torch.cuda.is_available():
        return 0
    there, needed = torch.cuda.device_count(), local_ranks + engine.count * engine.tensor
    if there < needed:
        raise ValueError(
            f"{local_ranks} training ranks and {engine.count} engines of {engine.tensor} GPUs need {needed} GPUs on "
            f"this machine, which has {there}; start fewer, or let them share with rollout.engine.colocated = true"
        )
    return local_ranks


def _publisher(base: Base, addresses: list[EngineAddress]) -> Publisher:
    config, settings = base.config, base.config.weight_sync
    common: dict[str, Any] = {
        "model": config.model.path,
        "leader": base.layout.rank == 0,
        "timeout_s": settings.timeout_s,
    }
    if settings.method == "disk":
        return DiskPublisher(addresses, folder=settings.folder or config.run.folder / "published", **common)
    return DistributedPublisher(addresses, bucket_mib=settings.bucket_mib, **common)


@contextmanager
def _recorder(base: Base, start: int, steps: int, kinds: Sequence[Kind], title: str) -> Iterator[RunRecorder]:
    """Writes records of `kinds` to the run folder; with none of them, only to the console."""
    config = base.config
    with ExitStack() as stack:
        sinks = None
        if base.layout.is_logger and kinds:
            sinks = stack.enter_context(
                open_sinks(
                    config.run.folder,
                    config.telemetry,
                    title=title,
                    first_step=start,
                    total_steps=steps,
                    kinds=kinds,
                    config=config.model_dump(mode="json"),
                )
            )
        elif base.layout.is_logger:
            sinks = stack.enter_context(Sinks([Console(title, total_steps=steps)]))
        yield RunRecorder(
            config.run.folder,
            base.layout,
            sinks,
            GpuMonitor(),
            base.prompts.domains,
            config.telemetry.rollouts_per_step,
        )


def _finish(base: Base, policy: MegatronPolicy) -> None:
    """The last weights as a Hugging Face folder, and the report."""
    folder = base.config.run.folder
    with together(base.layout, "writing the trained model"):
        save_hf(policy.export_weights(), folder / "hf", base.config.model.path, writer=base.layout.rank == 0)
    base.say(f"Weights: {folder / 'hf'}")
    if base.layout.is_logger:
        from fiberpo_megatron.telemetry.report import (
            write_report,
        )  # matplotlib: nothing that every start should pay for

        print(f"Report: {write_report(folder)}", flush=True)
    base.layout.barrier()
