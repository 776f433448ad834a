"""The requests of commands with few flags: `ldit recipes` and `ldit doctor`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RecipesRequest:
    """Options: a list of the recipes."""


@dataclass(frozen=True)
class DoctorRequest:
    """Options: a report on this installation."""

    json: bool = False
    """Print the report as one JSON object."""
