"""This module finds the publisher that a config names, and checks it before a run starts."""

from fiberpo_megatron import plugins
from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.plugins import Plugin, PluginError
from fiberpo_megatron.weight_sync.base import Publisher, PublisherContext
from fiberpo_megatron.weight_sync.settings import WeightSyncConfig

METHOD = "weight_sync.method"


def check_publisher(config: Config) -> None:
    """Raise PluginError when the publisher cannot be found, lacks a method, or does not take its options.

    This starts nothing and talks to no engine.
    """
    _find(config.weight_sync)


def make_publisher(config: Config, engines: EnginePool, rank: int, world_size: int) -> Publisher:
    """Return the publisher of [weight_sync]. Every rank calls it. Close the publisher when done.

    Raises PluginError that names the setting and the fix.
    """
    plugin, options = _find(config.weight_sync), config.weight_sync.options()
    context = PublisherContext(
        engines=engines,
        model=config.model.path,
        rank=rank,
        world_size=world_size,
        run_folder=config.run.folder,
        timeout_s=config.weight_sync.timeout_s,
    )
    try:
        made: Publisher = plugin.target(context, **options)
    except (TypeError, ValueError) as error:
        raise PluginError(f"{METHOD}: {plugin.path} does not accept its options {options}: {error}") from error
    return made


def _find(settings: WeightSyncConfig) -> Plugin:
    plugin = plugins.find("publishers", settings.method.use, METHOD)
    plugins.require(plugin, ("publish", "close"), METHOD)
    plugins.check_options(plugin, settings.options(), METHOD, given=("context",))
    plugins.check_version(plugin, settings.method.version, METHOD)
    return plugin
