"""This package configures a run: it has the schema, and reads TOML files and command-line overrides."""

from fiberpo_megatron.config.load import ConfigError, dump_config, load_config
from fiberpo_megatron.config.schema import Config

__all__ = ["Config", "ConfigError", "dump_config", "load_config"]
