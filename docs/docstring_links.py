"""Griffe extension: ``:func:`name` `` in a docstring becomes a link to the page that documents it."""

import re

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod):`([\w.]+)`")
# Where a name without a path is looked for, by the module that mentions it; what these re-export is public.
_NAMESPACES = ("parallax_core.reference", "parallax_core.frameworks.torch", "parallax_core.frameworks.jax")


class DocstringLinks(griffe.Extension):
    def on_object(self, *, obj, **_):
        if obj.docstring is None:
            return
        namespace = next(
            (name for name in _NAMESPACES if f"{obj.path}.".startswith(f"{name}.")), "parallax_core"
        )

        def link(match):
            name = match[1]
            path = name if name.startswith("parallax_core.") else f"{namespace}.{name}"
            return f"[`{name.removeprefix('parallax_core.')}`][{path}]"

        obj.docstring.value = _ROLE.sub(link, obj.docstring.value)
