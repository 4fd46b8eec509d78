"""Makes the source of rollouts that a config asks for: engines with what samples from them, or a replay."""

import json
import os
import socket
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fiberpo_megatron.config import Config
from fiberpo_megatron.data.encoding import Encoder
from fiberpo_megatron.data.prompts import Place, PromptSets
from fiberpo_megatron.engines.answers import RoutingShape
from fiberpo_megatron.engines.api_key import new_key, read_key
from fiberpo_megatron.engines.client import EngineAddress, EngineClient, Sampling
from fiberpo_megatron.engines.errors import EngineError
from fiberpo_megatron.engines.libraries import check_nccl
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.engines.process import check_reachable
from fiberpo_megatron.engines.registry import SLACK_S, Registry
from fiberpo_megatron.engines.router import RouterClient
from fiberpo_megatron.engines.servers import Servers, make_servers
from fiberpo_megatron.engines.settings import EngineConfig, ScoringServers
from fiberpo_megatron.engines.sizing import sized_engine
from fiberpo_megatron.interfaces import Policy, Recorder, RolloutSource
from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.mcore.parallel.layout import ParallelLayout
from fiberpo_megatron.rendezvous import master_address
from fiberpo_megatron.rollout.conversation import ParseTools
from fiberpo_megatron.rollout.environments import Environments
from fiberpo_megatron.rollout.filter import Filter
from fiberpo_megatron.rollout.fleet import Fleet, Member, Places
from fiberpo_megatron.rollout.generator import Generator
from fiberpo_megatron.rollout.sampler import EngineSampler
from fiberpo_megatron.rollout.scoring import ScoringFailed, ServedScores, check_vocabulary, probed_tokens
from fiberpo_megatron.rollout.tickets import Tickets
from fiberpo_megatron.sources.device_sharing import SeparateDevices, SharedDevices
from fiberpo_megatron.sources.engine import EngineSource, unwatched
from fiberpo_megatron.sources.engine_watch import EngineWatch
from fiberpo_megatron.sources.handover import CUT_S, AllEnded, CutShort, GoesOn, Handover
from fiberpo_megatron.sources.replay import ReplaySource
from fiberpo_megatron.sources.step_traces import StepTraces
from fiberpo_megatron.sources.stored import StoredRollouts
from fiberpo_megatron.sources.supply import Supply
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.together import together
from fiberpo_megatron.weight_sync.choose import make_publisher

ENGINE_RESERVE = 6
"""Tokens of its context that SGLang keeps for itself: it refuses a prompt that leaves no more than these."""


@dataclass(frozen=True)
class SourceParts:
    """It is what a source of rollouts is made of, on every rank."""

    config: Config
    hf_config: Mapping[str, Any]
    layout: ParallelLayout
    prompts: PromptSets
    sets: Mapping[str, Sequence[Place]]
    """The places of each evaluation set."""
    encoder: Encoder
    environments: Environments | None
    """None on ranks that lead no data-parallel replica."""
    timers: PhaseTimers
    stop: Callable[[], bool]
    registry: Registry | None
    """Where the job's engines register; None when the run starts them or has their addresses."""
    say: Callable[[str], None]
    """Writes one line for the person at the terminal."""
    scores: bool = True
    """Whether training trajectories are sampled, which the servers of a teacher or a reference score."""


@contextmanager
def rollout_source(
    parts: SourceParts, policy: Policy, recorder: Recorder, start: int, resume: bool
) -> Iterator[RolloutSource]:
    """Yield the source of a run that begins at step `start`; engines that were started here end with it."""
    config, environments = parts.config, parts.environments
    store = StoredRollouts(config, int(parts.hf_config["vocab_size"]), parts.layout, start, resume)

    def read(places: Any) -> Any:
        assert environments is not None, "leaders have environments"
        return environments.prompts(places, parts.encoder)

    if config.storage.replay is not None:
        parts.say(f"Rollouts come from {config.storage.replay}: no engine, no publication, no held-out evaluation")
        yield ReplaySource(
            parts.layout,
            parts.prompts,
            read,
            store,
            parts.timers,
            config.run.seed,
            config.batch.drawn_prompts,
            config.batch.filter is not None,
        )
        return
    with ExitStack() as stack:
        scorers = stack.enter_context(scoring_servers(parts))
        shared = SharedDevices(policy) if config.rollout.engine.colocated else None
        pool, places = stack.enter_context(engine_pool(parts))
        with together(parts.layout, "checking the engines"):
            if parts.layout.rank == 0:
                pool.check_preferences()
                if shared is not None and parts.layout.device.type == "cuda":
                    pool.require_memory_saver()
        if shared is not None:
            shared.attach(pool)
        router = stack.enter_context(_router(config, pool))
        sampler = make_sampler(config, parts.hf_config, parts.encoder, pool, router)
        publisher = stack.enter_context(
            closing(make_publisher(config, pool, parts.layout.rank, parts.layout.world_size))
        )
        watch = EngineWatch(pool, config.run.folder) if parts.layout.rank == 0 else None
        fleet = Fleet(
            parts.layout,
            pool,
            places,
            sampler if environments is not None else None,
            min_healthy=config.rollout.engine.min_healthy,
            router=router,
            changed=_unnoted if watch is None else watch.changed,
        )
        source = EngineSource(
            policy=policy,
            prompts=parts.prompts,
            read=read,
            generator=None if environments is None else _generator(parts, environments, sampler, pool, scorers),
            sampler=sampler,
            publisher=publisher,
            store=store,
            recorder=recorder,
            timers=parts.timers,
            weight_sync=config.weight_sync,
            patience_s=config.rollout.step_timeout_s,
            exact="bfloat16" not in (config.model.dtype, config.rollout.engine.dtype),
            seed=config.run.seed,
            prompts_per_step=config.batch.drawn_prompts,
            samples_per_prompt=config.batch.samples_per_prompt,
            held_out_prompts=config.evaluation.prompts,
            held_out_samples=config.evaluation.samples_per_prompt,
            sets=parts.sets,
            stop=parts.stop,
            devices=shared or SeparateDevices(),
            pool=pool,
            filter=_filter(config),
            tickets=Tickets(config.batch.drawn_prompts, config.rollout.staleness, config.trainer.steps),
            handover=partial(_handover, parts, sampler),
            counts=partial(_counts, environments, scorers, sampler),
            busy=sampler.take_busy if environments is not None else dict,
            traces=StepTraces(config.run.folder, parts.layout, parts.timers, config.telemetry.trace_steps_kept).write,
            watch=watch or unwatched,
            fleet=fleet,
        )
        yield stack.enter_context(closing(source))


def _filter(config: Config) -> Filter | None:
    """What [batch.filter] says."""
    batch, filter = config.batch, config.batch.filter
    return None if filter is None else Filter(filter.on, batch.prompts, batch.drawn_prompts, filter.max_refills)


def _handover(parts: SourceParts, sampler: EngineSampler, supply: Supply) -> Handover:
    """What `rollout.partial` says, where trajectories may be unfinished when weights are published."""
    rollout = parts.config.rollout
    if not rollout.staleness or rollout.partial == "retract":
        return GoesOn()
    if rollout.partial == "drain":
        return AllEnded(supply.drain)
    return CutShort(
        parts.layout,
        sampler if parts.environments is not None else None,
        lambda: supply.unfinished,
        CUT_S,
        shared=rollout.engine.colocated,
    )


@contextmanager
def _router(config: Config, pool: EnginePool) -> Iterator[RouterClient | None]:
    """Yield a client of the router that the config names; None without one."""
    engine = config.rollout.engine
    if engine.router_url is None:
        yield None
        return
    client = RouterClient(
        EngineAddress(engine.router_url), engine.request_timeout_s, config.rollout.max_concurrent_requests
    )
    try:
        yield client
    finally:
        pool.run(client.close())


def make_sampler(
    config: Config,
    hf_config: Mapping[str, Any],
    encoder: Encoder,
    pool: EnginePool,
    router: RouterClient | None = None,
) -> EngineSampler:
    """Return a sampler with the settings of [rollout]."""
    rollout = config.rollout
    return EngineSampler(
        pool,
        Sampling(
            max_response_tokens=rollout.max_response_tokens,
            stop_token_ids=encoder.stop_ids,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
        ),
        max_concurrent=rollout.max_concurrent_requests,
        vocabulary=int(hf_config["vocab_size"]),
        routing=_routing_shape(hf_config) if config.needs_rollout_routing else None,
        segment_tokens=rollout.chunk_tokens,
        silence_s=rollout.engine.silence_timeout_s,
        router=router,
    )


def _generator(
    parts: SourceParts,
    environments: Environments,
    sampler: EngineSampler,
    pool: EnginePool,
    scorers: Mapping[str, ServedScores],
) -> Generator:
    config, rollout = parts.config, parts.config.rollout
    parser = rollout.tool_call_parser
    parse: ParseTools | None = partial(sampler.parse_tool_calls, parser=parser) if parser else None
    return Generator(
        sampler,
        environments.running,
        parts.encoder,
        environments.loop,
        config.run.seed,
        config.data.random_reward,
        parse,
        scorers,
        {"temperature": rollout.temperature, "top_p": rollout.top_p, "max_tokens": rollout.max_response_tokens},
        _longest_sequence(parts),
    )


def _longest_sequence(parts: SourceParts) -> int:
    """The tokens that a conversation may have, prompt and turns together: those that the engine reads, and a row takes.

    What an agent says has no other bound, and a sequence beyond this one would end the run.
    """
    batch, multiple = parts.config.batch, parts.layout.sequence_multiple
    longest = read_architecture(parts.hf_config).max_positions - ENGINE_RESERVE
    return longest if batch.oversized != "error" else min(longest, batch.micro_batch_tokens // multiple * multiple)


def _routing_shape(hf_config: Mapping[str, Any]) -> RoutingShape:
    """The experts in the engine's answers; preflight has refused models that have none."""
    architecture = read_architecture(hf_config)
    assert architecture.experts is not None
    return RoutingShape(architecture.layers, architecture.experts.per_token, architecture.experts.count)


def _counts(
    environments: Environments | None, scorers: Mapping[str, ServedScores], sampler: EngineSampler
) -> dict[str, float]:
    """The counts of this rank's environments, requests and scorers since the last call, by metric."""
    found = {} if environments is None else dict(environments.take_metrics())
    found |= {f"requests/{name}": float(number) for name, number in sampler.take_counts().items()}
    for fact, scores in scorers.items():
        name = fact.removesuffix("_log_probs")
        found |= {f"scoring/{name}/{count}": value for count, value in scores.take_counts().items()}
    return found


@contextmanager
def scoring_servers(parts: SourceParts) -> Iterator[dict[str, ServedScores]]:
    """Yield the scorers of a run's trajectories by the fact of a trajectory that they give; none on ranks that do not
    lead a replica.

    Every rank calls it. Rank 0 compares the servers' vocabularies with the run's first: nothing was sampled by then.
    """
    with ExitStack() as stack:
        found: dict[str, ServedScores] = {}
        for fact, (section, servers) in parts.config.scoring_servers.items() if parts.scores else ():
            key: str | None = None
            with together(parts.layout, f"checking the servers of {section}"):
                if parts.layout.rank == 0 and servers.api_key_file is not None:
                    key = read_key(servers.api_key_file)
            key = json.loads(parts.layout.share_text(json.dumps(key) if parts.layout.rank == 0 else None))
            addresses = [EngineAddress(url.rstrip("/"), api_key=key, section=section) for url in servers.urls]
            with together(parts.layout, f"checking the servers of {section}"):
                if parts.environments is not None:
                    pool = EnginePool(
                        addresses,
                        timeout_s=servers.request_timeout_s,
                        max_concurrent=servers.max_concurrent_requests,
                        loop=parts.environments.loop,
                    )
                    found[fact] = ServedScores(stack.enter_context(pool), servers, section)
                if parts.layout.rank == 0:
                    _check_scoring(parts, found[fact], servers)
        yield found


def _check_scoring(parts: SourceParts, scores: ServedScores, servers: ScoringServers) -> None:
    vocabulary = int(parts.hf_config["vocab_size"])
    ids = probed_tokens(vocabulary, parts.encoder.stop_ids)

    def check(client: EngineClient) -> Coroutine[Any, Any, None]:
        return check_vocabulary(
            client,
            parts.encoder.tokenizer,
            ids,
            vocabulary=vocabulary,
            section=scores.section,
            trust=servers.trust_vocabulary,
        )

    try:
        scores.pool.on_all(check)
    except EngineError as error:
        raise ScoringFailed(f"{scores.section}: {error}") from error


@contextmanager
def engine_pool(parts: SourceParts) -> Iterator[tuple[EnginePool, Places | None]]:
    """Yield the pool of the run's engines on every rank, and on rank 0 where engines come from. Rank 0 waits for those
    of the job, or starts servers when no addresses are given; they end with the pool."""
    config, layout = parts.config, parts.layout
    engine, reasons = sized_engine(config, layout.device.type == "cuda")
    with ExitStack() as stack:
        addresses: list[EngineAddress] = []
        places: Places | None = None
        if parts.registry is not None:
            parts.say(f"Waiting for the engines of {', '.join(parts.registry.hosts())} ...")
        elif not config.rollout.engine.urls:
            for reason in reasons:
                parts.say(f"Engines: {reason}")
            parts.say(f"Starting SGLang (log: {config.run.folder / 'engines'}/engine_0.log) ...")
        patience_s = config.rollout.engine.start_timeout_s + SLACK_S
        with together(layout, "starting the rollout engines", patience_s + SLACK_S):
            if layout.rank == 0 and parts.registry is not None:
                places = stack.enter_context(closing(parts.registry))
                addresses = parts.registry.wait(patience_s)
                for address in addresses:
                    check_reachable(address)
            elif layout.rank == 0:
                servers = _servers(config, engine, layout)
                stack.callback(servers.close)
                places, addresses = servers, servers.addresses
        shared = layout.share_text(json.dumps([[a.url, a.api_key] for a in addresses]) if layout.rank == 0 else None)
        addresses = addresses or [EngineAddress(url, api_key=key) for url, key in json.loads(shared)]
        pool = stack.enter_context(
            EnginePool(
                addresses,
                timeout_s=config.rollout.engine.request_timeout_s,
                max_concurrent=config.rollout.max_concurrent_requests,
                loop=None if parts.environments is None else parts.environments.loop,
            )
        )
        yield pool, places


def _unnoted(members: Sequence[Member]) -> None:
    """Write nothing about the engines: another rank does."""


def _servers(config: Config, engine: EngineConfig, layout: ParallelLayout) -> Servers:
    """Start servers on this machine, or look for the given ones."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", layout.world_size))
    if layout.device.type == "cuda":  # `fiberpo` has done so before, other launchers have not
        check_nccl(config)
    return make_servers(
        engine,
        config.model.path,
        config.run.folder / "engines",
        dtype=config.model.dtype,
        seed=config.run.seed,
        host="127.0.0.1" if local_ranks == layout.world_size else master_address() or socket.gethostname(),
        routed_experts=config.needs_rollout_routing,
        first_gpu=_first_engine_gpu(engine, local_ranks),
        api_key=_api_key(engine),
    )


def _api_key(engine: EngineConfig) -> str | None:
    """For given servers: what their file says, if anything; else a fresh one."""
    if engine.api_key_file is not None:
        return read_key(engine.api_key_file)
    return None if engine.urls else new_key()


def _first_engine_gpu(engine: EngineConfig, local_ranks: int) -> int:
    """Index of the first GPU of the engines that are started here: on the training ranks' GPUs, or behind them."""
    if engine.colocated or engine.urls or not torch.cuda.is_available():
        return 0
    available, needed = torch.cuda.device_count(), local_ranks + engine.count * engine.tensor
    if available < needed:
        raise ValueError(
            f"{local_ranks} training ranks and {engine.count} engines of {engine.tensor} GPUs need {needed} GPUs on "
            f"this machine, which has {available}; start fewer, or let them share with rollout.engine.colocated = true"
        )
    return local_ranks
