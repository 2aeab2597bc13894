"""Exceptions that are parallax-core's own; every other error is a ValueError or a TypeError."""


class BackendUnavailableError(RuntimeError):
    """No backend can run the call on this machine: a GPU, a driver or a package is missing.

    The message says what is missing and which extra of the distribution installs it.
    """


class SolverError(RuntimeError):
    """A ridge system could not be solved to the accuracy promised.

    Raised when a Cholesky factorisation meets a matrix that is not numerically positive definite, or when
    conjugate gradients do not converge. Rows whose inputs are not finite do not raise: their result is NaN.
    """
