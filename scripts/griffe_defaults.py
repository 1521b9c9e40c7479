"""An extension of Griffe, which reads the sources for the reference: tables of parameters get what readers look for.

A default that is a constant's name is shown as its value. A struct whose docstring has ``Args:`` gets the parameters
that msgspec makes of its fields. The expression that a constructor assigns to an attribute is not shown.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import griffe


class RealDefaults(griffe.Extension):
    """Changes parameters when a package is read, before any page is made."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Griffe calls this once for each package."""
        self._visit(pkg)

    def _visit(self, scope: griffe.Module | griffe.Class) -> None:
        for member in list(scope.members.values()):
            if isinstance(member, griffe.Class) and _is_documented_struct(member):
                member.set_member("__init__", _constructor(member))
            if isinstance(member, (griffe.Module, griffe.Class)):
                self._visit(member)
            elif isinstance(member, griffe.Function):
                for parameter in member.parameters:
                    parameter.default = _value(parameter.default, member)
            elif isinstance(member, griffe.Attribute) and member.labels == {"instance-attribute"}:
                member.value = None


def _is_documented_struct(one: griffe.Class) -> bool:
    is_struct = any(str(base).rpartition(".")[2] == "Struct" for base in one.bases)
    return is_struct and one.docstring is not None and "\nArgs:\n" in one.docstring.value


def _constructor(struct: griffe.Class) -> griffe.Function:
    """Private fields too: they take a place."""
    fields = [one for one in struct.attributes.values() if one.annotation is not None and "property" not in one.labels]
    parameters = [
        griffe.Parameter(
            field.name,
            annotation=field.annotation,
            kind=griffe.ParameterKind.positional_or_keyword,
            default=field.value,
        )
        for field in fields
    ]
    itself = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
    return griffe.Function("__init__", parameters=griffe.Parameters(itself, *parameters), parent=struct)


def _value(default: str | griffe.Expr | None, function: griffe.Function) -> str | griffe.Expr | None:
    """The constant's value; anything else as it is."""
    if isinstance(default, griffe.ExprName):
        # Of another package, or made when the program runs: its name says more.
        with suppress(griffe.AliasResolutionError, griffe.CyclicAliasError, KeyError):
            found = function.modules_collection[default.canonical_path]
            target = found.final_target if isinstance(found, griffe.Alias) else found
            if isinstance(target, griffe.Attribute) and isinstance(target.value, str):
                return target.value
    return default
