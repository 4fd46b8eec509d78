"""Engines are sized from the batch, unless the settings say otherwise, and the reasons are said."""

from fiberpo_megatron.config import Config
from fiberpo_megatron.engines.sizing import sized_engine


def config(engine: dict[str, object], **sections: object) -> Config:
    usual = {"model": {"path": "m"}, "batch": {"prompts": 256, "samples_per_prompt": 8}}
    return Config.model_validate({**usual, "rollout": {"engine": engine}, **sections})


def test_an_engine_takes_its_share_of_the_step():
    assert config({"count": 4, "tensor": 2}, slurm={"engine_nodes": 2}).running_requests == 256
    assert config({"count": 3}).running_requests == 683
    assert config({"urls": ["http://a:1", "http://b:1"]}).running_requests == 1024
    assert config({"count": 4}, parallel={"data": 1}).running_requests == 64, "one leader keeps 256 in flight"
    assert config({"count": 4, "max_running_requests": 7}).running_requests == 7


def test_sizes_come_with_reasons():
    engine, reasons = sized_engine(config({"count": 8, "colocated": True}), gpu=True)
    assert engine.max_running_requests == 256
    assert engine.extra_args == ["--cuda-graph-max-bs-decode", "256", "--chunked-prefill-size", "4096"]
    running, graphs, prefill, cache = reasons
    assert running == "max_running_requests = 256: one engine's share of a step of 2048 responses"
    assert "up to 256 responses" in graphs and "4096 tokens" in prefill and "8 samples of a prompt" in cache


def test_what_is_set_stays():
    extra = ["--cuda-graph-max-bs", "16", "--chunked-prefill-size=2048", "--disable-radix-cache"]
    engine, reasons = sized_engine(
        config({"colocated": True, "max_running_requests": 9, "extra_args": extra}), gpu=True
    )
    assert engine.extra_args == extra and reasons == ["max_running_requests = 9: as set"]
    engine, reasons = sized_engine(config({"count": 1}), gpu=False)
    assert engine.extra_args == [] and len(reasons) == 1
