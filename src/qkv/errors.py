"""The one error that a person can act on."""


class QkvError(ValueError):
    """A mistake in what was given: one sentence that says where, what was found, and what to do.

    The command line prints it and exits with status 2; any other exception is our own fault (status 1).
    """


class SpecError(QkvError):
    """A fault at one path of a spec or recipe; `path` is the dotted path."""

    def __init__(self, path: str, fault: str) -> None:
        super().__init__(f"{path}: {fault}" if path else fault)
        self.path, self.fault = path, fault
