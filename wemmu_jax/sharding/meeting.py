"""All processes of a run meet, before JAX joins them.

JAX's own join aborts a process when another does not come, and does not say which. So process 0 first listens at the
coordinator's address, where JAX will listen afterwards, until the others have reported there.
"""

import json
import socket
import time

_RETRY = 0.2  # seconds between two attempts to reach process 0
_MESSAGE = 10.0  # seconds that a line may take once there is a connection


def meet(address: str, *, count: int, index: int, timeout: float) -> None:
    """Returns in every process once all have come.

    Args:
      address: HOST:PORT of process 0, as every process can reach it.
      count: how many processes there are.
      index: which of them this is, from 0.
      timeout: seconds.

    Raises:
      TimeoutError: a process never came. All that did come raise it, and it names those that did not.
      ValueError: processes disagree on how many they are, or two have the same number.
      OSError: process 0 cannot listen there.
    """
    host, port = _split(address)
    deadline = time.monotonic() + timeout
    if index == 0:
        _receive(port, count, deadline, timeout)
    else:
        _report(host, port, count, index, deadline, timeout)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"the coordinator must be HOST:PORT of process 0; found {address!r}")
    return host.strip("[]"), int(port)


def _receive(port: int, count: int, deadline: float, timeout: float) -> None:
    """Process 0: waits for the others, then tells all to go on, or what is wrong."""
    came: dict[int, socket.socket] = {}
    with _listen(port) as server:
        try:
            while len(came) < count - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                connection, _ = server.accept()
                # Who was killed meanwhile has to come again.
                for index in [index for index, other in came.items() if _gone(other)]:
                    came.pop(index).close()
                _admit(connection, count, came)
        except (TimeoutError, ValueError) as error:
            if isinstance(error, TimeoutError):
                missing = sorted(set(range(1, count)) - came.keys())
                error = TimeoutError(
                    f"{len(came) + 1} of {count} processes came within {timeout:g} s; missing: "
                    f"{', '.join(map(str, missing))}. Start all {count}, each with its own number and the same "
                    "coordinator, and see that they reach it"
                )
            for connection in came.values():
                _send(connection, {"error": str(error), "kind": type(error).__name__})
            raise error from None
        for connection in came.values():
            _send(connection, {"go": True})
        # They hang up first, so that the port is free at once for JAX.
        for connection in came.values():
            _receive_line(connection)


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512
            )
        return socket.create_server(("", port), backlog=512)
    except OSError as error:
        raise OSError(
            f"process 0 cannot listen on port {port} ({error}); give all processes a coordinator with a free port"
        ) from error


def _admit(connection: socket.socket, count: int, came: dict[int, socket.socket]) -> None:
    """Puts a process that reports into `came`; whoever speaks another language is sent away."""
    hello = _receive_line(connection)
    if "index" not in hello:
        connection.close()
        return
    index = hello["index"]
    if hello["count"] != count:
        error = f"process {index} was told of {hello['count']} processes, process 0 of {count}"
    elif index in came:
        error = f"two processes were started as number {index} of {count}"
    else:
        came[index] = connection
        return
    _send(connection, {"error": error, "kind": "ValueError"})
    raise ValueError(error)


def _gone(connection: socket.socket) -> bool:
    """Whether the other side has hung up, as that of a process does that was killed."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _report(host: str, port: int, count: int, index: int, deadline: float, timeout: float) -> None:
    """Another process: tells process 0 that it is there, and waits for the word to go on."""
    answer: dict = {}
    # Process 0 may start later, or be the one of a run that is just ending.
    while not answer and time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=_MESSAGE) as connection:
                _send(connection, {"index": index, "count": count})
                # Process 0 gives up first, because it knows who is missing.
                answer = _receive_line(connection, deadline - time.monotonic() + _MESSAGE)
        except OSError:
            pass
        if not answer:
            time.sleep(_RETRY)
    if not answer:
        raise TimeoutError(
            f"process {index} of {count} waited {timeout:g} s for process 0 at {host}:{port}, which never came"
        )
    if "error" in answer:
        raise (TimeoutError if answer["kind"] == "TimeoutError" else ValueError)(answer["error"])


def _send(connection: socket.socket, message: dict) -> None:
    try:
        connection.settimeout(_MESSAGE)
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        pass  # gone by now; JAX will notice, if it matters


def _receive_line(connection: socket.socket, seconds: float = _MESSAGE) -> dict:
    """One message, empty if there is none within `seconds` or it is no message of ours."""
    connection.settimeout(seconds)
    try:
        with connection.makefile("r", encoding="utf-8") as lines:
            message = json.loads(lines.readline(10_000))
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}
