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
