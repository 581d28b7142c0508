"""How an engine fails."""


class ServerError(RuntimeError):
    """A call to a server that failed: which server, which call, why. The engine may recover from it."""


class EngineError(RuntimeError):
    """An engine that cannot go on: what failed, what to do. Raised on all ranks alike."""
