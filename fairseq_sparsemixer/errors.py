"""The error a command line ends with."""


class ConfigurationError(SystemExit, ValueError):
    """A flag, file or checkpoint that cannot be used: ends the program with one sentence instead of a traceback.

    As a ValueError it is also what library callers expect to catch.
    """

    def __init__(self, message: str):
        super().__init__(f"fairseq-sparsemixer: {message}")
        self.message = message

    def __reduce__(self):
        return type(self), (self.message,)  # a process that reports it to another must not prefix it twice
