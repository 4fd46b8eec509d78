"""All ways of publishing against a real SGLang server."""

import asyncio
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.engines.answers import RoutingShape
from fiberpo_megatron.engines.client import EngineAddress, EngineClient, Sampling
from fiberpo_megatron.engines.errors import EngineError, EngineTimeout
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.engines.servers import StartedServers, make_servers
from fiberpo_megatron.engines.settings import EngineConfig
from fiberpo_megatron.rollout.sampler import EngineSampler
from fiberpo_megatron.types import Completion
from fiberpo_megatron.weight_sync.compare import WeightMismatch, compare_log_probs
from fiberpo_megatron.weight_sync.disk import DiskPublisher
from fiberpo_megatron.weight_sync.rounds import RoundPublisher
from tests.tiny_model import LAYERS, TOP_K, VOCABULARY, chosen_experts, hugging_face_weights, load, log_probs, moved
from tests.weight_sync.per_rank import OWN, publish_from_megatron
from tests.weight_sync.sources import Tensors, context
from tests.weight_sync.trainer_rank import (
    made_publisher,
    publish_and_die,
    publish_as_its_scheduler_dies,
    publish_as_rank,
)

pytestmark = pytest.mark.sglang
ROUNDING = 1e-4
"""float32 on both sides; other summation orders were seen to move log-probs by 5e-6."""
IN_ROUNDS = ["disk", "distributed", "ipc"]
"""An engine loads the first rounds while the last ones are still prepared."""
METHODS = [*IN_ROUNDS, "delta"]
SLOW = pytest.mark.exhaustive
"""For ways whose processes would take too long in `make test`; one way stays there."""
PROBE = [5, 9, 2, 33, 12, 60, 4]


@contextmanager
def publisher(method: str, engine: EngineAddress, checkpoint: Path, folder: Path) -> Iterator[RoundPublisher]:
    with (
        EnginePool([engine], timeout_s=30) as pool,
        closing(made_publisher(method, context(pool, checkpoint, folder))) as made,
    ):
        yield made


def scores(engine: EngineAddress) -> np.ndarray:
    with EnginePool([engine], timeout_s=30) as pool:
        return pool.run(pool.clients[0].score(PROBE))


def after_a_full_load(engine: EngineAddress, model: PreTrainedModel, folder: Path) -> str:
    """Return the checksum of what the engine holds after it has loaded the model from a folder of transformers."""
    model.save_pretrained(folder / "reference")
    with EnginePool([engine], timeout_s=30) as pool:
        version = pool.run(pool.clients[0].model_info()).weight_version
        pool.run(pool.clients[0].update_weights_from_disk(folder / "reference", version, 30))
        return pool.run(pool.clients[0].checksum())


@pytest.mark.parametrize("method", METHODS)
def test_the_engine_computes_with_the_published_weights(method, engine, checkpoint, tmp_path):
    old = log_probs(load(checkpoint), PROBE)
    np.testing.assert_allclose(scores(engine), old, atol=ROUNDING)
    with publisher(method, engine, checkpoint, tmp_path / "published") as publishing:
        for seed in (1, 2):
            model = moved(checkpoint, seed)
            publishing.publish(Tensors(hugging_face_weights(model)), str(seed))
            assert len(publishing.plan) > 2 and publishing.checksums == [after_a_full_load(engine, model, tmp_path)]
            new = log_probs(model, PROBE)
            assert np.abs(new - old).mean() > 100 * ROUNDING
            np.testing.assert_allclose(scores(engine), new, atol=ROUNDING)
            compare_log_probs(new, scores(engine), tolerance=ROUNDING, engine="it", version=str(seed))
            with pytest.raises(WeightMismatch, match="mean .* max"):
                compare_log_probs(old, scores(engine), tolerance=ROUNDING, engine="it", version=str(seed))
    if method == "disk":
        assert [folder.name for folder in (tmp_path / "published/published").iterdir()] == ["2"]
        assert len(list((tmp_path / "published/published/2").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("method", ["distributed", "ipc"])
def test_what_a_killed_trainer_left_behind_does_not_stop_the_next(method, engine, checkpoint):
    async def leave_behind() -> None:
        async with EngineClient(engine, timeout_s=60) as client:
            await client.pause()
            await client.begin_weight_update(30)

    asyncio.run(leave_behind())
    model = moved(checkpoint)
    with publisher(method, engine, checkpoint, Path()) as publishing:
        publishing.publish(Tensors(hugging_face_weights(model)), "1")
    np.testing.assert_allclose(scores(engine), log_probs(model, PROBE), atol=ROUNDING)


@pytest.mark.parametrize("method", METHODS)
def test_a_response_across_two_publications_names_three_versions(method, engine, checkpoint, tmp_path):
    models = {"first": load(checkpoint), "second": moved(checkpoint, 1), "third": moved(checkpoint, 2)}
    with (
        EnginePool([engine], timeout_s=60) as pool,
        publisher(method, engine, checkpoint, tmp_path) as publishing,
    ):
        publishing.publish(Tensors(hugging_face_weights(models["first"])), "first")
        running = pool.submit(pool.clients[0].generate([[3, 4, 5]] * 32, Sampling(400), seeds=range(32)))
        for version in ("second", "third"):
            time.sleep(0.4)
            publishing.publish(Tensors(hugging_face_weights(models[version])), version)
        completions = running.result(60)
    most = max(completions, key=lambda c: (len(c.weight_spans), len(c.token_ids)))
    assert_spans(most, models)


def test_the_segments_of_a_response_have_the_experts_of_the_weights_that_sampled_them(engine, checkpoint, tmp_path):
    """A publication aborts the requests; each goes on behind its tokens, with the next weights."""
    models = {"first": load(checkpoint), "second": moved(checkpoint, 1), "third": moved(checkpoint, 2)}
    with (
        EnginePool([engine], timeout_s=60) as pool,
        publisher("disk", engine, checkpoint, tmp_path) as publishing,
    ):
        shape = RoutingShape(LAYERS, TOP_K, experts=4)
        sampler = EngineSampler(pool, Sampling(400), max_concurrent=64, vocabulary=VOCABULARY, routing=shape)
        publishing.publish(Tensors(hugging_face_weights(models["first"])), "first")
        running = pool.submit(sampler.sample([3, 4, 5], range(32)))
        for version in ("second", "third"):
            time.sleep(0.4)
            sampler.hold()
            sampler.cut_short(30)
            publishing.publish(Tensors(hugging_face_weights(models[version])), version)
            sampler.release()
        completions = running.result(60)
    most = max(completions, key=lambda c: (len(c.weight_spans), len(c.token_ids)))
    assert_spans(most, models)
    tokens = [3, 4, 5, *most.token_ids]
    assert most.routed_experts is not None and len(most.routed_experts) == len(tokens) - 1
    for span in most.weight_spans:
        # what sampled a token at position p had read position p - 1; the first span has the prompt as well
        begin, end = (span.start + 2 if span.start else 0), span.end + 2
        ours = np.sort(most.routed_experts[begin:end], -1)
        theirs = np.sort(chosen_experts(models[span.version], tokens)[begin:end], -1)
        assert (ours == theirs).all(-1).mean() > 0.99  # an exact tie of two router scores may fall either way


def assert_spans(completion: Completion, models: Mapping[str, PreTrainedModel]) -> None:
    """Check that each span of a response behind [3, 4, 5] has the log-probs of its own weights."""
    assert [span.version for span in completion.weight_spans] == list(models)
    assert [span.start for span in completion.weight_spans] == [0, *(s.end for s in completion.weight_spans[:-1])]
    assert completion.weight_spans[-1].end == len(completion.token_ids)
    for span in completion.weight_spans:
        expected = log_probs(models[span.version], [3, 4, 5, *completion.token_ids])[2:]
        np.testing.assert_allclose(
            completion.log_probs[span.start : span.end], expected[span.start : span.end], atol=ROUNDING
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_export_leaves_the_old_weights(method, engine, checkpoint, tmp_path):
    class Dies(Tensors):
        def share(self, limit):
            for number, tensors in enumerate(super().share(limit)):
                if number == 0:
                    raise FloatingPointError("the trainer's own failure")
                yield tensors

    wrong = [
        (name, tensor[:3] if name == "model.norm.weight" else tensor)
        for name, tensor in hugging_face_weights(moved(checkpoint))
    ]
    model = moved(checkpoint)
    with publisher(method, engine, checkpoint, tmp_path) as publishing:
        with pytest.raises(ValueError, match=r"model.norm.weight has shape \(3,\), .* \(64,\)"):
            publishing.publish(Tensors(wrong), "bad")
        with pytest.raises(FloatingPointError, match="own failure"):
            publishing.publish(Dies(hugging_face_weights(moved(checkpoint))), "bad")
        np.testing.assert_allclose(scores(engine), log_probs(load(checkpoint), PROBE), atol=ROUNDING)
        publishing.publish(Tensors(hugging_face_weights(model)), "good")
    np.testing.assert_allclose(scores(engine), log_probs(model, PROBE), atol=ROUNDING)


@pytest.mark.parametrize("method", ["distributed", "ipc"])
def test_a_half_loaded_publication_is_never_served_and_can_be_repeated(method, engine, checkpoint):
    """SGLang itself fails in a later round: this side's check of shapes is taken out."""
    wrong = [
        (name, torch.zeros(7) if name == "model.norm.weight" else tensor)
        for name, tensor in hugging_face_weights(moved(checkpoint))
    ]
    model = moved(checkpoint)
    with publisher(method, engine, checkpoint, Path()) as publishing, EnginePool([engine], timeout_s=1) as pool:
        manifest, publishing._manifest = publishing._manifest, None
        with pytest.raises(EngineError, match="Attempted to load weight") as raised:
            publishing.publish(Tensors(wrong), "1")
        assert "mixture of weights" in str(raised.value.__notes__)
        assert pool.run(pool.clients[0].model_info()).weight_version == "incomplete-1"
        with pytest.raises(EngineTimeout):
            pool.run(pool.clients[0].generate([[3, 4, 5]], Sampling(1)))
        publishing._manifest, publishing.plan = manifest, []
        publishing.publish(Tensors(hugging_face_weights(model)), "2")
        assert pool.run(pool.clients[0].model_info()).weight_version == "2"
    np.testing.assert_allclose(scores(engine), log_probs(model, PROBE), atol=ROUNDING)


KILLED = [
    *((method, stage) for method in METHODS for stage in ("beginning", "round", "commit")),
    ("delta", "loading"),
]


@pytest.mark.parametrize(
    ("method", "stage"),
    [pytest.param(*one, marks=() if one == ("ipc", "round") else SLOW, id="-".join(one)) for one in KILLED],
)
def test_a_trainer_that_is_killed_leaves_whole_weights_or_a_paused_engine_and_the_next_publishes(
    method, stage, engine, checkpoint, tmp_path
):
    """What an engine generates with is the publication before, until the next one is complete."""
    model = moved(checkpoint)
    context = torch.multiprocessing.get_context("spawn")
    killed = context.Process(target=publish_and_die, args=(method, engine, checkpoint, tmp_path, stage))
    killed.start()
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    untouched = stage == "beginning" or (method == "delta" and stage != "loading")
    before = "first" if method == "delta" else "checkpoint"
    held = {"round": {"incomplete-killed"}, "commit": {"killed"}, "loading": {"first", "killed"}}
    with EnginePool([engine], timeout_s=5 if untouched else 1) as pool:
        version = pool.run(pool.clients[0].model_info()).weight_version
        assert version in ({before} if untouched else held[stage])
        if untouched:
            (completion,) = pool.run(pool.clients[0].generate([[3, 4, 5]], Sampling(1)))
            assert [span.version for span in completion.weight_spans] == [before]
        else:
            with pytest.raises(EngineTimeout):
                pool.run(pool.clients[0].generate([[3, 4, 5]], Sampling(1)))
    with publisher(method, engine, checkpoint, tmp_path) as publishing:
        publishing.publish(Tensors(hugging_face_weights(model)), "next")
        assert publishing.checksums == [after_a_full_load(engine, model, tmp_path)]
    np.testing.assert_allclose(scores(engine), log_probs(model, PROBE), atol=ROUNDING)


@pytest.mark.exhaustive
def test_an_engine_whose_scheduler_dies_in_a_round_is_named_on_every_rank(checkpoint, tmp_path):
    """The broadcasts of both ranks break off at once; SGLang's server says so a second later, by ending."""
    config = EngineConfig(start_timeout_s=180)
    with make_servers(config, checkpoint, tmp_path / "engines", dtype="float32", gpu=False, api_key="key") as servers:
        assert isinstance(servers, StartedServers) and servers._processes[0] is not None
        children = psutil.Process(servers._processes[0].process.pid).children(recursive=True)
        (scheduler,) = [child.pid for child in children if "scheduler" in " ".join(child.cmdline())]
        arguments = (str(tmp_path), servers.addresses[0], checkpoint, scheduler)
        torch.multiprocessing.spawn(publish_as_its_scheduler_dies, args=arguments, nprocs=2)
        for rank in range(2):
            seconds, said = (tmp_path / f"error-{rank}").read_text().split("\n", 1)
            assert said.startswith(f"EngineUnreachable: engine {servers.addresses[0].url}: "), said
            assert float(seconds) < 30, "long before weight_sync.timeout_s"


def test_a_publication_under_another_version_is_noticed(engine, checkpoint, tmp_path):
    class Forgetful(DiskPublisher):
        def send(self, this, version, deadline):
            folder = self.folder / version
            return self.engines.begin_on_all(
                lambda client: client.update_weights_from_disk(folder, "other", deadline.left())
            )

    with (
        EnginePool([engine], timeout_s=30) as pool,
        closing(Forgetful(context(pool, checkpoint, tmp_path))) as publishing,
        pytest.raises(EngineError, match="weights '1' were published, but it reports weights 'other'"),
    ):
        publishing.publish(Tensors(hugging_face_weights(load(checkpoint))), "1")


def test_an_engine_that_lost_its_copy_gets_all_weights_again(engine, checkpoint, tmp_path):
    """As after a restart of the engine, or when it was killed while it changed its copy."""
    model, folder = moved(checkpoint, 2), tmp_path / "published"
    with publisher("delta", engine, checkpoint, tmp_path) as publishing:
        publishing.publish(Tensors(hugging_face_weights(moved(checkpoint))), "1")
        with EnginePool([engine], timeout_s=30) as pool:
            copy = Path(pool.run(pool.clients[0].model_info()).model_path)
        (copy / "fiberpo-state.json").unlink()
        publishing.publish(Tensors(hugging_face_weights(model)), "2")
        assert (folder / "2/model.safetensors.index.json").exists()
        few = slightly_changed(model)
        publishing.publish(Tensors(hugging_face_weights(few)), "3")
        assert not (folder / "3/model.safetensors.index.json").exists()
        size = sum(path.stat().st_size for path in (folder / "3").glob("*.safetensors"))
        assert 0 < size < sum(p.stat().st_size for p in copy.glob("*.safetensors")) / 20
        assert publishing.checksums == [after_a_full_load(engine, few, tmp_path)]
    np.testing.assert_allclose(scores(engine), log_probs(few, PROBE), atol=ROUNDING)


def slightly_changed(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model after a change of every 500th element of each weight."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.view(-1)[::500] += 0.5
    return model


@pytest.mark.parametrize("method", ["ipc", *(pytest.param(way, marks=SLOW) for way in METHODS if way != "ipc")])
def test_two_ranks_publish_their_shares_beside_a_group_of_their_own(method, engine, checkpoint, tmp_path):
    model = moved(checkpoint)
    save_file({name: tensor.contiguous() for name, tensor in hugging_face_weights(model)}, tmp_path / "weights")
    torch.multiprocessing.spawn(publish_as_rank, args=(method, str(tmp_path), engine, checkpoint), nprocs=2)
    with EnginePool([engine], timeout_s=30) as pool:
        checksum = pool.run(pool.clients[0].checksum())
        assert pool.run(pool.clients[0].model_info()).weight_version == "2"
    assert checksum == after_a_full_load(engine, model, tmp_path)


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"expert": 2}, {"pipeline": 2}], ids=str)
def test_a_publisher_from_outside_the_package_carries_the_shards_of_two_megatron_ranks(
    parallel, engine, checkpoint, tmp_path
):
    model = moved(checkpoint)
    new = tmp_path / "new"
    model.save_pretrained(new)
    run_ranks(2, publish_from_megatron, OWN, parallel, engine, new, tmp_path / "run")
    np.testing.assert_allclose(scores(engine), log_probs(model, PROBE), atol=ROUNDING)


@pytest.mark.exhaustive
@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"expert": 2}, {"pipeline": 2}], ids=str)
@pytest.mark.parametrize("method", IN_ROUNDS)
def test_two_megatron_ranks_publish(method, parallel, engine, checkpoint, tmp_path):
    model = moved(checkpoint)
    new = tmp_path / "new"
    model.save_pretrained(new)
    run_ranks(2, publish_from_megatron, method, parallel, engine, new, tmp_path / "run")
    with EnginePool([engine], timeout_s=30) as pool:
        checksum = pool.run(pool.clients[0].checksum())
    assert checksum == after_a_full_load(engine, model, tmp_path)
