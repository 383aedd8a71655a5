"""How Griffe, which reads the library for the reference, has to be helped."""

from typing import Any

import griffe


class Reading(griffe.Extension):
    """Changes what Griffe has read, for the site only."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Has the section `Example:` read as `Examples:`, as code."""
        if obj.docstring:
            value = obj.docstring.value
            obj.docstring.value = value.replace("\nExample:\n", "\nExamples:\n")

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Has `scion_jax.scion` mean the function, not the file of the same name that holds it."""
        for name, member in pkg.members.items():
            if not isinstance(member, griffe.Alias):
                continue
            module = pkg[member.target_path.removeprefix(f"{pkg.path}.")]
            if isinstance(module, griffe.Module):
                pkg.members[name] = griffe.Alias(name, module[name], parent=pkg)
