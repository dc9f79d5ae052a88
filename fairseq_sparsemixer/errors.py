"""The error that a command exits with."""


class ConfigurationError(SystemExit, ValueError):
    """An unusable flag, file or checkpoint: exits with one sentence instead of a traceback.

    It is also a ValueError, which is what library callers expect to catch.
    """

    def __init__(self, message: str):
        super().__init__(f"fairseq-sparsemixer: {message}")
        self.message = message

    def __reduce__(self):
        return type(self), (self.message,)  # unpickling in another process must not add the prefix twice
