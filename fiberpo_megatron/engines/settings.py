"""These settings describe the SGLang servers: [rollout.engine]."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from fiberpo_megatron.engines.arguments import check_extra_args
from fiberpo_megatron.engines.urls import checked_url
from fiberpo_megatron.settings import Section


class ScoringServers(Section):
    """These settings say which running SGLang servers score a run's trajectories with another model. The address of one
    server, or a list of addresses, stands for `{urls = [...]}`."""

    urls: list[str] = Field(min_length=1)
    """Addresses of the servers (http://host:port, or https); all serve the same model."""
    api_key_file: Path | None = None
    """File (mode 0600) with the API key of the servers."""
    max_concurrent_requests: int = Field(64, ge=1)
    """Trajectories that one data-parallel leader has in work at the servers, all servers together."""
    request_timeout_s: float = Field(600.0, gt=0)
    """Seconds one scoring request may take, its wait in the server's queue included."""
    retries: int = Field(3, ge=0)
    """How often a request that was lost, or had no answer in time, is sent again, to the next server where there are
    several."""
    trust_vocabulary: bool = False
    """Take it for granted that every token id means the same to the servers. false: it is checked before anything is
    sampled; a server without a tokenizer (--skip-tokenizer-init) cannot be asked and is refused."""

    @model_validator(mode="before")
    @classmethod
    def nothing_secret(cls, values: Any) -> Any:
        """Check `urls` before any other message could show a password that stands in them."""
        urls = values.get("urls") if isinstance(values, dict) else None
        if isinstance(urls, list):
            found = [checked_url(url, "the api_key_file of the same table") for url in urls]
            if len(set(found)) < len(found):
                raise ValueError("urls names a server twice; name each once")
        return values

    @model_validator(mode="before")
    @classmethod
    def addresses_alone(cls, values: Any) -> Any:
        """Take an address, or a list of addresses, for `urls`. It runs before `nothing_secret`, so that a message is
        about a table and shows no value."""
        if isinstance(values, str | list):
            values = {"urls": values}
        if isinstance(values, dict) and isinstance(values.get("urls"), str):
            values = {**values, "urls": [values["urls"]]}
        return values


class EngineConfig(Section):
    """These settings hold either the addresses of running SGLang servers, or how to start servers."""

    urls: list[str] = []
    """Addresses of running servers (http://host:port, or https). Empty: the run starts `count` servers itself. A
    server that was started with arguments which change the distribution of its tokens, such as
    --preferred-sampling-params, is refused."""
    router_url: str | None = None
    """Address of an sglang-router before the servers in `urls`. Requests for tokens go through it; it chooses the
    engine, so that no figure is by engine. The run keeps its list of workers. It cannot pass an API key on, nor the
    experts of tokens."""
    api_key_file: Path | None = None
    """File (mode 0600) with the API key of the servers in `urls`. Servers that the run starts get a fresh key each run
    when this is unset."""
    count: int = Field(1, ge=1)
    """Servers started on this node when `urls` is empty."""
    tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks of a server: its GPUs, or processes on a platform without GPU."""
    port: int | None = Field(None, ge=1, le=65535)
    """First port; server i listens on port + i. Unset: free ports are found."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Type in which the server computes; auto is the model's (`model.dtype`)."""
    threads: int = Field(1, ge=1)
    """CPU threads of a server (platform without GPU)."""
    max_total_tokens: int | None = Field(None, ge=1)
    """Size of the KV cache in tokens. Unset on a GPU: it follows from `memory_fraction`; unset without a GPU: 16384."""
    max_running_requests: int = Field(0, ge=0)
    """Requests that an engine decodes together. 0: its share of a step's responses, which the run prints when it starts
    the engines."""
    colocated: bool = False
    """Run the engines on the training ranks' GPUs. While they generate, gradients are dropped and the optimizer's state
    waits in host memory; while the trainer learns, they release weights and KV cache. On GPUs this needs
    weight_sync.method = "ipc" or "disk"; servers given by URL need --enable-memory-saver."""
    memory_fraction: float = Field(0.8, gt=0, le=1)
    """Share of GPU memory for weights and KV cache; colocated engines share it with the trainer's parameters."""
    start_timeout_s: float = Field(1800.0, gt=0)
    """Seconds a server may take to become healthy: reading weights, compiling kernels and capturing CUDA graphs take
    many minutes for a large model. A server process that ends is noticed at once."""
    request_timeout_s: float = Field(3600.0, gt=0)
    """Seconds one generation request may take, its wait in the server's queue included."""
    silence_timeout_s: float = Field(300.0, ge=0)
    """Seconds for which an engine that has requests may give no sign of life. Then its requests are asked at another
    engine. Publications do not count. 0: an engine that hangs is noticed by `request_timeout_s` alone."""
    min_healthy: int = Field(1, ge=1)
    """Engines that must hold the current weights after a publication. With fewer the run stops and names those that
    are missing; until then it goes on without them."""
    restarts: int = Field(3, ge=0)
    """How often the run starts each of its servers again, where it died or hung. A server that was started again
    gets requests once it has the run's weights and has been verified."""
    python: Path | None = None
    """Interpreter that has SGLang, for cases where SGLang's pinned versions disagree with the trainer's. Unset: the
    environment variable FIBERPO_SGLANG_PYTHON (set in the CUDA image), else the trainer's own."""
    extra_args: list[str] = []
    """Further arguments of `python -m sglang.launch_server`. Those that the run sets itself are refused, and so are
    those that would make it inexact or unsafe. Without a GPU the run's own choice of backends takes precedence."""

    @model_validator(mode="after")
    def a_router_stands_before_given_servers(self) -> "EngineConfig":
        if self.router_url is None:
            return self
        checked_url(self.router_url)
        if not self.urls or self.api_key_file is not None:
            why = "an API key, which the router does not pass on" if self.urls else "no urls of servers behind it"
            raise ValueError(
                f"rollout.engine.router_url = {self.router_url!r} with {why}: start the servers without a key in a "
                "network of their own, name them in rollout.engine.urls, and start the router without workers"
            )
        return self

    @model_validator(mode="after")
    def enough_engines(self) -> "EngineConfig":
        engines = len(self.urls) or self.count
        if self.min_healthy > engines and self.urls:
            raise ValueError(
                f"rollout.engine.min_healthy = {self.min_healthy}, but urls names {engines} servers; lower it"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def nothing_secret_or_overriding(cls, values: Any) -> Any:
        """Check `urls` and `extra_args` before any other message could show a password or key that stands in them."""
        if not isinstance(values, dict):
            return values
        urls, arguments = values.get("urls"), values.get("extra_args")
        if isinstance(urls, str):
            checked_url(urls)
            raise ValueError("rollout.engine.urls is a text; write a list of texts, even for one address")
        if isinstance(urls, list):
            found = [checked_url(url) for url in urls]
            if len(set(found)) < len(found):
                raise ValueError("rollout.engine.urls names a server twice; each would get its weights twice")
        if isinstance(arguments, str):
            arguments = arguments.split()
        if isinstance(arguments, list):
            check_extra_args(arguments)
        return values
