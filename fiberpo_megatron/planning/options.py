"""This module writes what a search chose as options of the command line."""

from typing import Any

from fiberpo_megatron.planning.estimate import Plan
from fiberpo_megatron.settings import PluginConfig

COLOCATED_METHOD = PluginConfig(use="ipc")
"""How weights reach engines on the training GPUs; `distributed`, the default, needs GPUs of their own for engines."""


def settings(plan: Plan) -> list[str]:
    """Return the settings of a plan that the search chose, as options of the command line."""
    parallel, engine = plan.config.parallel, plan.config.rollout.engine
    names = ("tensor", "pipeline", "context", "expert", "expert_tensor", "virtual_pipeline", "data")
    values: dict[str, Any] = {f"parallel.{name}": getattr(parallel, name) for name in names}
    values |= {
        "parallel.uneven_stages": parallel.uneven_stages,
        "model.dtype": plan.config.model.dtype,
        "model.recompute": plan.config.model.recompute,
        "batch.kept_forwards": plan.config.batch.kept_forwards,
        "optimizer.cpu_offload": plan.config.optimizer.cpu_offload,
        "rollout.max_concurrent_requests": plan.config.rollout.max_concurrent_requests,
        "rollout.engine.urls": "[]",
        "rollout.engine.count": engine.count,
        "rollout.engine.tensor": engine.tensor,
        "rollout.engine.colocated": engine.colocated,
        "rollout.engine.dtype": engine.dtype,
        "slurm.engine_nodes": plan.config.slurm.engine_nodes,
        "slurm.share_nodes": plan.config.slurm.share_nodes,
    }
    scenario = plan.scenario
    values["rollout.staleness"] = int(scenario.staleness)
    if scenario.staleness:
        values["rollout.partial"] = "drain" if scenario.drain else "retract"
    if engine.colocated and plan.config.weight_sync.method == COLOCATED_METHOD:
        values["weight_sync.method"] = COLOCATED_METHOD.use
    return [word for name, value in values.items() for word in (f"--{name}", _text(value))]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
