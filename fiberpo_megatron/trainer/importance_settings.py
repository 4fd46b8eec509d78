"""This module defines the settings of tokens that another distribution sampled than the trainer's:
[algorithm.importance] and [algorithm.mismatch]. docs/rollouts.md has their mathematics."""

from typing import Literal

from pydantic import Field, model_validator

from fiberpo_megatron.settings import Section

Method = Literal["off", "token", "icepop", "sequence", "sequence-mask", "levels"]
_READS: dict[str, tuple[str, ...]] = {
    "off": (),
    "token": ("cap",),
    "icepop": ("low", "high"),
    "sequence": ("cap",),
    "sequence-mask": ("low", "high"),
    "levels": ("cap", "high", "levels"),
}
"""Settings that a method reads beside itself."""


class ImportanceLevels(Section):
    """These settings are the bounds of the method "levels", in nats per token."""

    token: float | None = Field(None, gt=0)
    """Clip of a token's y against the mean of what its version sampled of the trajectory. Unset: log(cap)."""
    trajectory: float | None = Field(None, gt=0)
    """Clip of that mean against its version's. Unset: log(cap)."""
    version: float | None = Field(None, gt=0)
    """Clip of the mean of a version. Unset: log(cap)."""
    mask_trajectory: float | None = Field(None, gt=0)
    """What a version sampled of a trajectory gets weight 0 where its mean is further from its version's. Unset:
    log(high)."""
    mask_version: float | None = Field(None, gt=0)
    """A version gets weight 0 where its mean is further from 0. Unset: log(high)."""
    mask_engine: float | None = Field(None, gt=0)
    """An engine's tokens get weight 0 where their mean is further from 0; it changes no weight otherwise. Unset:
    log(high)."""


class ImportanceConfig(Section):
    """These settings weigh each token by how likely the trainer finds it, compared with the engine that sampled it: w =
    F(y), y = log pi_old - log mu (docs/rollouts.md). Weights multiply mu in the objective and in its terms."""

    method: Method | None = None
    """off: 1; token: min(e^y, cap); icepop: e^y inside [low, high], else 0; sequence: e to the trajectory's mean y, at
    most cap; sequence-mask: 1 where that ratio is inside [low, high], else 0; levels: residuals of y along trajectory
    and version, each clipped, with nodes masked. Unset: "off" where training and generation are in step, and "token"
    where weights may be older; the run's config.toml has what held. "off" is refused where weights may be older."""
    cap: float = Field(2.0, ge=1)
    """Largest weight of token and sequence. A large number, such as 1e9, is none."""
    low: float = Field(0.5, ge=0, le=1)
    """Smallest ratio that icepop and sequence-mask keep."""
    high: float = Field(5.0, ge=1)
    """Largest ratio that icepop and sequence-mask keep."""
    levels: ImportanceLevels = ImportanceLevels()

    @model_validator(mode="after")
    def settings_are_read(self) -> "ImportanceConfig":
        """Refuse a setting that the method does not read."""
        if self.method is None:
            return self
        for name in ("cap", "low", "high", "levels"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default and name not in _READS[self.method]:
                readers = ", ".join(method for method, names in _READS.items() if name in names)
                shown = "" if name == "levels" else f" = {value:g}"
                raise ValueError(
                    f'algorithm.importance.{name}{shown} is read by {readers}, and method = "{self.method}" does not '
                    "read it; remove it, or change the method"
                )
        return self

    def method_at(self, staleness: int) -> Method:
        """Return the method of a run whose tokens may be sampled with weights that are so many versions old.

        Raises ValueError for "off" where they may be older than the trainer's.
        """
        if staleness > 0 and self.method == "off":
            raise ValueError(
                f'algorithm.importance.method = "off" with a staleness of {staleness}: tokens of older weights would '
                'be trained as if the trainer had sampled them; choose "token", or leave the method unset'
            )
        return self.method or ("token" if staleness > 0 else "off")


class MismatchConfig(Section):
    """These settings bound how far an engine and the trainer may differ about the same weights: the mean |y| of the
    tokens that an engine sampled in a step with the trainer's own weights, in nats per token. It is numerics alone."""

    warn: float = Field(0.1, ge=0)
    """Above it the run gives a warning that names the engine, its tokens and the figure; 0: no warning."""
    mask: float = Field(0.5, ge=0)
    """Above it all of the engine's tokens of the step have weight 0, and the warning says so; where every engine is
    above it, the run stops. 0: no engine is masked."""
    stop: float = Field(0.0, ge=0)
    """Above it the run stops, whatever the other engines do. 0: it stops only where `mask` would leave no engine."""

    @model_validator(mode="after")
    def limits_grow(self) -> "MismatchConfig":
        """Refuse limits of which a milder one could never act."""
        limits = {name: getattr(self, name) for name in ("warn", "mask", "stop")}
        given = [(name, value) for name, value in limits.items() if value > 0]
        for (name, value), (next_name, next_value) in zip(given, given[1:]):
            if value > next_value:
                raise ValueError(
                    f"algorithm.mismatch.{name} = {value:g} is above {next_name} = {next_value:g}; set limits that "
                    "grow from warn over mask to stop, or switch one off with 0"
                )
        return self
