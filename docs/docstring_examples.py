"""Extension of griffe: `Example:` of a docstring holds code, as `Examples:` does.

Both are Google's; griffe knows the plural only, and takes `>>>` of the other for Markdown.
"""

import re

import griffe


class DocstringExamples(griffe.Extension):
    """Rename the heading before docstrings are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rename it in the docstring of one object."""
        if obj.docstring:
            value = obj.docstring.value
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", value, flags=re.M)
