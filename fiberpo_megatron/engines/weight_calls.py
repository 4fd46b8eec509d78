"""This module holds the calls that change the weights of one SGLang server."""

import base64
from collections.abc import Sequence
from pathlib import Path

from fiberpo_megatron.engines import answers
from fiberpo_megatron.engines.connection import CONTROL_TIMEOUT_S, Connection


class WeightCalls(Connection):
    """Updates the weights of one server: from a folder, from a broadcast, or from memory that it shares."""

    async def update_weights_from_disk(self, folder: Path, version: str | None, timeout_s: float) -> None:
        """Load the safetensors of `folder` (a path on the server's machine) in place; what they lack stays as it is.

        `version` is None if it does not change.

        A folder that cannot be read leaves the old weights. A tensor of the wrong shape kills the server: its
        rollback reads the same folder.
        """
        # without load_format, a server that was started with random weights would draw random ones again
        request = {"model_path": str(folder), "load_format": "auto"}
        if version is not None:
            request["weight_version"] = version
        await self._command("/update_weights_from_disk", request, timeout_s)

    async def begin_weight_update(self, timeout_s: float) -> None:
        await self._command("/begin_weight_update", {"selector": "all"}, timeout_s)

    async def end_weight_update(self, timeout_s: float) -> None:
        await self._command("/end_weight_update", {}, timeout_s)

    async def init_weights_update_group(
        self,
        host: str,
        port: int,
        rank_offset: int,
        world_size: int,
        group: str,
        backend: str,
        timeout_s: float,
    ) -> None:
        """Make the server's tensor-parallel ranks join `group` as ranks rank_offset, rank_offset + 1, ..."""
        request = {
            "master_address": host,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group,
            "backend": backend,
        }
        await self._command("/init_weights_update_group", request, timeout_s)

    async def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group: str,
        version: str | None,
        timeout_s: float,
    ) -> None:
        """Make the server receive one flat bucket of these tensors from rank 0 of `group` and load it.

        `version` is given with the last bucket.
        """
        request: dict[str, object] = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group,
            "load_format": "flattened_bucket",
            "flush_cache": version is not None,
        }
        if version is not None:
            request["weight_version"] = version
        await self._command("/update_weights_from_distributed", request, timeout_s)

    async def destroy_weights_update_group(self, group: str, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        await self._command("/destroy_weights_update_group", {"group_name": group}, timeout_s)

    async def update_weights_from_tensor(
        self, payloads: Sequence[bytes], version: str | None, timeout_s: float
    ) -> None:
        """Make the server load the tensors that `payloads` describe, one for each of its tensor-parallel ranks.

        The payloads are those of `weight_sync/ipc.py`, which only servers with our plugin understand
        (engines/sglang_plugin); `version` is None if it does not change.
        """
        request: dict[str, object] = {
            "serialized_named_tensors": [base64.b64encode(payload).decode() for payload in payloads],
            "flush_cache": version is not None,
        }
        if version is not None:
            request["weight_version"] = version
        await self._command("/update_weights_from_tensor", request, timeout_s)

    async def checksum(self, timeout_s: float = CONTROL_TIMEOUT_S) -> str:
        """Return the checksum of the weights that the server holds, joined over its tensor-parallel ranks."""
        answer = await self._command("/weights_checker", {"action": "checksum"}, timeout_s)
        with self._answer_errors("/weights_checker"):
            return answers.checksum(answer)
