"""The base of all sections of the configuration. Nothing here imports torch."""

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A configuration that cannot be used: one line a problem, each with its key and the remedy."""


class LayoutError(ConfigError):
    """One whose model, batch or ranks do not divide as its layout needs it.

    rule: what is broken, without numbers.
    """

    def __init__(self, message: str, rule: str):
        super().__init__(message)
        self.rule = rule


class Section(BaseModel):
    """A section refuses unknown keys, values of another type, and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
