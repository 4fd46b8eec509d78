"""This plugin of SGLang (entry-point group `sglang.srt.plugins`) runs in every server that a run starts.

SGLang loads it in each of the server's processes, before it reads its arguments. README.md beside this folder says what
each hook is for.
"""

import os
import socket
from typing import Any

KEY_FD = "FIBERPO_API_KEY_FD"
"""Environment variable with the file descriptor of a pipe, from which the key can be read once."""

_kept: list[Any] = []
"""The rendezvous store, which must live as long as the process."""


def _with_key(server_args: Any, *args: object, **kwargs: object) -> Any:
    """Return the parsed arguments with the API key of the pipe; anybody on the machine could read a command line."""
    with os.fdopen(int(os.environ[KEY_FD])) as pipe:
        server_args.api_key = pipe.readline().strip()
    return server_args


def _without_key(shown: dict[str, Any], *args: object, **kwargs: object) -> dict[str, Any]:
    """Return what SGLang writes to its log about its arguments, without the key."""
    return shown | {"api_key": "<redacted>"}


def _key_for_health(decide: Any, *args: object, **request: Any) -> Any:
    """Decide about a request for /health and /health_generate, which has the server generate, as about any other."""
    if str(request.get("path", "")).startswith("/health"):
        request["path"] = "/generate"
    return decide(*args, **request)


def _rendezvous_on_loopback(server_args: Any) -> None:
    """Host the store in which the server's own ranks meet; torch's would listen on every interface."""
    from torch.distributed import TCPStore

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", server_args.nccl_port))
    listener.listen(1024)
    port = listener.getsockname()[1]
    _kept.append(
        TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    )
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # all ranks are clients


def _sleep_while_paused(result: Any, scheduler: Any) -> Any:
    """Wait for the next request in every turn of the loop of a paused engine, as SGLang does in an idle one.

    SGLang's loop would only look for requests, again and again, and so take a core from the trainer, which prepares
    weights meanwhile, and from the server's own process for HTTP.
    """
    scheduler.maybe_sleep_on_idle()  # with --sleep-on-idle; until a request comes, but at most 1 s
    return result


def register() -> None:
    """Register the hooks; SGLang calls this entry point."""
    import fiberpo_delta
    import fiberpo_weights
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    fiberpo_delta.register()
    fiberpo_weights.register()
    if KEY_FD in os.environ:
        HookRegistry.register("sglang.srt.server_args.prepare_server_args", _with_key, HookType.AFTER)
        HookRegistry.register("sglang.srt.entrypoints.engine._server_args_for_logging", _without_key, HookType.AFTER)
        HookRegistry.register("sglang.srt.utils.auth.decide_request_auth", _key_for_health, HookType.AROUND)
    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler._record_scheduler_state_for_paused_engine",
        _sleep_while_paused,
        HookType.AFTER,
    )
    HookRegistry.register(
        "sglang.srt.entrypoints.engine._set_envs_and_config", _rendezvous_on_loopback, HookType.BEFORE
    )
