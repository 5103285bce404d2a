"""What goes wrong when a backend is asked for by name."""


class BackendUnavailable(RuntimeError):
    """A backend named explicitly cannot run here; the message says why and what to do. There is never a silent fallback."""
