"""How a user's mistake reaches the user: one message, no traceback."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def message_instead_of_traceback() -> Iterator[None]:
    """Ends the program with the message of a ValueError or OSError raised while a run is being set up.

    Raises:
        SystemExit: with `error: ...`, exit status 1.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
