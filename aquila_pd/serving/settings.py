"""Settings: limits and access control of a server, a frozen dataclass built from the command line."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits and access of one server. Times are seconds, sizes bytes."""

    name: str  # of the model, in /v1/models and in every answer
    slots: int = 8  # sequences in the batch
    max_queue: int = 64  # sequences that wait for a slot
    max_body: int = 4 * 2**20
    request_timeout: float = 600.0  # of a whole request, waiting included
    stall_timeout: float = 60.0  # how long a client may take nothing of a stream
    shutdown_grace: float = 30.0
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()  # names, beside localhost and addresses, under which the server is called

    @property
    def most_sequences(self) -> int:
        """Running and waiting ones together."""
        return self.slots + self.max_queue
