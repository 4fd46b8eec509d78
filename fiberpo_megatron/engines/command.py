"""This module makes the command line and the environment of an SGLang server, with a GPU and without."""

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fiberpo_megatron.engines.addresses import interface_of
from fiberpo_megatron.engines.settings import EngineConfig
from fiberpo_megatron.subprocesses import set_gpu_variables, without_launcher

PLUGIN = Path(__file__).parent / "sglang_plugin" / "path"
CPU_STAND_INS = Path(__file__).parent / "sglang_cpu" / "path"
CPU_KV_TOKENS = 16384
LARGEST_REUSED = 2**30
"""Bytes of a tensor up to which a server without a GPU allocates from memory that it has used before."""
ASK_TIMEOUT_S = 60.0
SERVER_KEEP_ALIVE_S = 60
"""Seconds for which our servers keep idle connections open; clients drop theirs much sooner
(`connection.KEEP_ALIVE_S`)."""

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
ONLINE_UPDATES = {"SGLANG_OPT_DEEPGEMM_HC_PRENORM": "0", "SGLANG_OPT_HOPPER_BLOCK_FP8_BF16": "0"}
"""SGLang refuses new weights while it keeps copies of old ones in another form; these switch such copies off."""

_ASK_TORCH = """
import torch
nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ("none",)
print(torch.__version__, ".".join(map(str, nccl)))
"""


@dataclass(frozen=True)
class Server:
    """Says what one server serves and where."""

    model: Path
    """Hugging Face folder."""
    dtype: str
    """float32 or bfloat16."""
    host: str
    """Address on which it listens."""
    port: int
    """Port for HTTP."""
    internal_port: int
    """Port at which the server's own tensor-parallel ranks meet."""
    seed: int
    """Seed of sampling without per-request seeds."""
    gpu: bool
    first_gpu: int = 0
    """Index of its first GPU among the visible ones."""
    routed_experts: bool = False
    """Return the experts of every token on request."""
    deterministic: bool = False
    """Obey per-request sampling seeds; on a GPU this uses batch-invariant kernels, which are slower."""


def server_command(server: Server, config: EngineConfig) -> list[str]:
    """Return `python -m sglang.launch_server ..` with `engine.extra_args`.

    Where an argument stands twice SGLang takes the last. The settings refuse what is set before `extra_args`; the
    choices without a GPU follow them.
    """
    command = [interpreter(config), "-m", "sglang.launch_server"]
    command += [
        "--model-path",
        str(server.model.resolve()),
        "--host",
        server.host,
        "--port",
        str(server.port),
    ]
    if not any(server.model.glob("*.safetensors")):
        command += ["--load-format", "dummy"]
    command += ["--nccl-port", str(server.internal_port), "--dtype", server.dtype]
    command += ["--random-seed", str(server.seed), "--max-running-requests", str(config.max_running_requests or 64)]
    # token ids go in and come out, so no tokenizer and no grammar is needed
    command += [
        "--skip-tokenizer-init",
        "--grammar-backend",
        "none",
        "--sleep-on-idle",
        "--skip-server-warmup",
    ]
    command += ["--tp-size", str(config.tensor)]
    if server.gpu:
        command += ["--base-gpu-id", str(server.first_gpu), "--mem-fraction-static", str(config.memory_fraction)]
    tokens = config.max_total_tokens or (None if server.gpu else CPU_KV_TOKENS)
    if tokens is not None:
        command += ["--max-total-tokens", str(tokens)]
    if server.routed_experts:
        command.append("--enable-return-routed-experts")
    if config.colocated and server.gpu:
        command.append("--enable-memory-saver")
    if server.deterministic:
        command.append("--enable-deterministic-inference")
    command += config.extra_args
    if not server.gpu:
        command += ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
        command += ["--disable-overlap-schedule", "--disable-cuda-graph", "--disable-radix-cache"]
    return command


def interpreter(config: EngineConfig) -> str:
    """Return the Python that has SGLang. Raises FileNotFoundError when the one that is set does not exist."""
    chosen = config.python or os.environ.get("FIBERPO_SGLANG_PYTHON")
    if chosen and not os.access(chosen, os.X_OK):
        source = "rollout.engine.python" if config.python else "FIBERPO_SGLANG_PYTHON"
        raise FileNotFoundError(
            f"{source} = {chosen} is not an executable; name the python that has sglang, or unset it"
        )
    return str(chosen or sys.executable)


def sglang_version(python: str) -> str | None:
    """Return the version of SGLang that an interpreter has, or None if it has none."""
    if python == sys.executable:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version("sglang")
        return None
    ask = "from importlib.metadata import version; print(version('sglang'))"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


@dataclass(frozen=True)
class TorchLibraries:
    """Names the versions of what two processes must agree on to send tensors to each other."""

    torch: str
    nccl: str
    """Version of the NCCL that is loaded, such as 2.30.7, or "none"."""


def torch_libraries(python: str) -> TorchLibraries:
    """Return the versions of torch and of NCCL that an interpreter loads. It imports torch, which takes seconds.

    Raises RuntimeError with the end of its message when it cannot import torch, or not within `ASK_TIMEOUT_S`.
    """
    try:
        done = subprocess.run(
            [python, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{python} cannot import torch within {ASK_TIMEOUT_S:g} s") from error
    if done.returncode:
        raise RuntimeError(f"{python} cannot import torch: {done.stderr.strip()[-400:]}")
    return TorchLibraries(*done.stdout.split())


def server_environment(
    parent: Mapping[str, str], config: EngineConfig, server: Server, key: int | None
) -> dict[str, str]:
    """Return the parent's environment without the variables of its own launcher, with those that the server needs.

    `key` is the file descriptor from which the server reads its API key, which must appear neither in the environment
    nor on the command line.
    """
    environment = without_launcher(parent)
    environment["PYTHONUNBUFFERED"] = "1"
    environment["PYTHONSAFEPATH"] = "1"  # the working directory must not shadow a module
    environment["HF_HUB_OFFLINE"] = "1"  # a wrong folder is an error, not the name of a model on the hub
    # SGLang drops idle connections after 5 s. A busy trainer reads answers late, and so may use one that just closes.
    environment.setdefault("SGLANG_TIMEOUT_KEEP_ALIVE", str(SERVER_KEEP_ALIVE_S))
    folders = [PLUGIN] if server.gpu else [PLUGIN, CPU_STAND_INS]
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, folders), *filter(None, [parent.get("PYTHONPATH")])])
    interface = interface_of(server.host)
    if interface is not None:  # gloo would listen on the address of the host's name, whoever can reach that
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    if key is not None:
        environment["FIBERPO_API_KEY_FD"] = str(key)
    if server.gpu:
        return _on_gpu(environment, config)
    if config.tensor > 1:  # SGLang asks for the cores of each rank where ranks outnumber NUMA nodes
        environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", _cores(config.tensor))
    return environment | {
        "SGLANG_USE_CPU_ENGINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(config.threads),
        "TORCH_COMPILE_DISABLE": "1",  # the first request would otherwise compile for 20 s
        # glibc would map every tensor of more than 32 MiB anew, and the kernel would clear each page of it again
        "MALLOC_MMAP_THRESHOLD_": str(LARGEST_REUSED),
        "MALLOC_TRIM_THRESHOLD_": str(2 * LARGEST_REUSED),
        "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",  # with the core dump: 5 s between a crash and the exit
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
    }


def _cores(ranks: int) -> str:
    """Return the cores of each rank of a server without a GPU, as SGLang reads them: "0,2|1,3" for two ranks.

    Ranks share cores where there are fewer cores than ranks.
    """
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[rank::ranks] or [cores[rank % len(cores)]] for rank in range(ranks)]
    return "|".join(",".join(map(str, share)) for share in shares)


def _on_gpu(environment: dict[str, str], config: EngineConfig) -> dict[str, str]:
    """Return the environment of a server on GPUs: NCCL as in the ranks, and nothing of the trainer's torch."""
    set_gpu_variables(environment)
    if interpreter(config) != sys.executable and (paths := environment.get("LD_LIBRARY_PATH")):
        # an image puts its own torch there, which the engine's Python would load in place of its own
        kept = [path for path in paths.split(os.pathsep) if not _has_torch(path)]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(kept)
    for name in ALLOCATOR_VARIABLES if config.colocated else ():  # the memory saver cannot pause expandable segments
        options = [text for text in environment.pop(name, "").split(",") if text.strip()]
        kept = [text for text in options if text.partition(":")[0].strip() != "expandable_segments"]
        if kept:
            environment[name] = ",".join(kept)
    return environment | ONLINE_UPDATES


def _has_torch(folder: str) -> bool:
    return any((Path(folder) / name).exists() for name in ("libtorch.so", "libtorch_cuda.so", "libc10.so"))
