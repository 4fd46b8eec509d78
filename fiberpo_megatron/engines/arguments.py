"""This module refuses arguments of SGLang that must not stand in `rollout.engine.extra_args`."""

from collections.abc import Iterable

_RUN = "the run chooses it; leave it out"
_ONE_SERVER = "start more servers with rollout.engine.count"
_KEY = "rollout.engine.api_key_file names a key of your own"
_SAMPLING = "set rollout.temperature, rollout.top_p and rollout.top_k: every request carries them"
_BIAS = "tokens would not come from the policy's distribution, so that importance ratios would be wrong; leave it out"
_TLS = "servers that a run starts speak HTTP; give servers with TLS in rollout.engine.urls"
_PORT = "it opens a port that asks for no key; leave it out"

REFUSED = {
    # what the run sets
    "--api-key": _KEY,
    "--admin-api-key": _KEY,
    "--host": "the run listens where its ranks are, and nowhere else; leave it out",
    "--port": "set rollout.engine.port",
    "--nccl-port": _RUN,
    "--dist-init-addr": _RUN,
    "--nccl-init-addr": _RUN,
    "--model-path": "set model.path",
    "--model": "set model.path",
    "--load-format": _RUN,
    "--weight-version": _RUN,
    "--dtype": "set rollout.engine.dtype",
    "--device": _RUN,
    "--random-seed": "set run.seed",
    "--max-running-requests": "set rollout.engine.max_running_requests",
    "--max-total-tokens": "set rollout.engine.max_total_tokens",
    "--mem-fraction-static": "set rollout.engine.memory_fraction",
    "--tp-size": "set rollout.engine.tensor",
    "--tensor-parallel-size": "set rollout.engine.tensor",
    "--dp-size": _ONE_SERVER,
    "--data-parallel-size": _ONE_SERVER,
    "--base-gpu-id": _RUN,
    "--gpu-id-step": _RUN,
    "--skip-tokenizer-init": _RUN,
    "--grammar-backend": _RUN,
    "--sleep-on-idle": _RUN,
    "--skip-server-warmup": _RUN,
    "--enable-return-routed-experts": "set rollout.return_routing",
    "--enable-memory-saver": "set rollout.engine.colocated",
    # what would change the distribution of the tokens, or the prompts
    "--preferred-sampling-params": _SAMPLING,
    "--sampling-defaults": _SAMPLING,
    "--allow-auto-truncate": "prompts would be cut unnoticed; shorten them, or lower rollout.max_response_tokens",
    "--speculative-accept-threshold-single": _BIAS,
    "--speculative-accept-threshold-acc": _BIAS,
    "--enable-strict-thinking": _BIAS,
    "--enable-watermark": _BIAS,
    "--watermark-config": _BIAS,
    # what would be unsafe
    "--config": "the file could hold any other argument; write its arguments into rollout.engine.extra_args",
    "--trust-remote-code": "code of a model folder is never run; use a model that SGLang knows",
    "--enable-custom-logit-processor": "it runs code that a request brings; leave it out",
    "--delete-ckpt-after-loading": "it deletes the folder of model.path; leave it out",
    "--ssl-keyfile": _TLS,
    "--ssl-certfile": _TLS,
    "--grpc-port": _PORT,
    "--grpc-mode": _PORT,
    "--smg-grpc-mode": _PORT,
    "--smg-http-sidecar-port": _PORT,
    "--grpc-http-sidecar-port": _PORT,
    "--sidecar": _PORT,
    "--sidecar-args": _PORT,
}
"""Arguments that must not be given, and what to do instead. Every argument that `server_command` passes is here, except
for the backends that it chooses without a GPU, which follow `extra_args` there."""


def check_extra_args(arguments: Iterable[object]) -> None:
    """Raise ValueError for an argument that the run sets, or that would make a run inexact or unsafe.

    `--name=value` and the abbreviations that SGLang's parser takes (`--hos` for `--host`) count as the argument itself.
    """
    for argument in arguments:
        if not isinstance(argument, str) or not argument.startswith("--"):
            continue
        name = argument.partition("=")[0].replace("_", "-")
        for refused, instead in REFUSED.items():
            if refused.startswith(name):
                means = "" if name == refused else f" (short for {refused})"
                raise ValueError(f"rollout.engine.extra_args must not hold {name!r}{means}: {instead}")
