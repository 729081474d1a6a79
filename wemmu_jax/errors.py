"""Which errors are the user's to mend, and which of them may be gone when the same command runs again."""

import errno
import socket

USER_ERRORS = (ValueError, OSError, FloatingPointError, ModuleNotFoundError)

# Of a network, of storage behind one, and of a device that is not well.
_PASSING = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.EBUSY, errno.ENOTCONN, errno.EHOSTDOWN),
        *(errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET),
        socket.EAI_AGAIN,
    }
)


def passes(error: BaseException) -> bool:
    """Whether an error is one of the moment. A file that is missing, a folder that nobody may write, a full disk and
    an OSError without a number are not."""
    if isinstance(error, TimeoutError | ConnectionError | BlockingIOError | InterruptedError):
        return True
    return isinstance(error, OSError) and error.errno in _PASSING
