"""Requests of commands that take little: `ldit recipes` and `ldit doctor`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RecipesRequest:
    """Options: a list of the recipes."""


@dataclass(frozen=True)
class DoctorRequest:
    """Options: a report on this installation."""

    json: bool = False
    """One JSON object."""
