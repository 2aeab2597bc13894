"""Options for the compiler of kernels beside their own."""

from parallax_core.cuda_kernels import compiler


def add_options(patch, *more):
    """patch: undoes it."""
    options = compiler._options
    patch.setattr(compiler, "_options", lambda *arguments: (*options(*arguments), *more))
