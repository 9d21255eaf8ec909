"""From flags or a cluster's environment to a team of processes, by `jax.distributed`."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.native_messages import set_aside
from rgsp_jax.pipeline.processes import HEARTBEAT_TIMEOUT, REFUSED, START_TIMEOUT, Processes, describe_lost

KNOWN = "SLURM, Open MPI, Kubernetes (with the package kubernetes) and Cloud TPU"
HOW = "--coordinator HOST:PORT --processes N --process I"


@contextmanager
def connect_processes(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
    start_timeout: int = START_TIMEOUT,
    say: Callable[[str], None] = print,
) -> Iterator[Processes]:
    """Meet the other processes of a run; leaving ends it for all, in order.

    What is not given comes from the environment, as `jax.distributed.initialize` finds it. Must come before anything
    that makes JAX look for its devices.

    Args:
        coordinator: `HOST:PORT` where process 0 can be reached; the port is free there.
        processes, process: how many there are, and which one this is, from 0.
        heartbeat_timeout: seconds after which a process that gives no sign of life is lost.
        start_timeout: seconds for all to arrive.
        say: takes remarks, in process 0.

    Raises:
        RefusedError: no cluster is known here, or the flags do not go together. Where not all arrive in time, the
            process ends with a sentence and exit code 2.
    """
    given = (coordinator, processes, process)
    check_flags(*given)
    team: list[Processes] = []
    where = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or "the coordinator that the environment names"

    def describe() -> str:
        if not team:
            who = f"the {processes} processes" if processes else "the processes"
            text = f"{who} did not all meet at {where} within {start_timeout} s: see whether all were started"
        else:
            text = "; ".join(team[0].problems or (describe_lost([0], team[0].count, team[0].kept),))
        return f"error: {text}\n"

    with set_aside(describe, REFUSED):
        # A lost process must not abort the others before they have said so; SIGTERM must end a process as ever.
        jax.config.update("jax_enable_recoverability", True)
        jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                *given,
                cluster_detection_method=None if None in given else "deactivate",
                initialization_timeout=start_timeout,
                heartbeat_timeout_seconds=heartbeat_timeout,
            )
        except (ValueError, TypeError) as error:
            raise RefusedError(f"--distributed: JAX knows no cluster here ({KNOWN}): give {HOW} ({error})") from None
        except RuntimeError as error:
            raise RefusedError(f"--distributed: the processes cannot meet at {where}: {first_line(error)}") from None
        # JAX has no public name for the client; multihost_utils and Orbax take it from here too.
        from jax._src.distributed import global_state

        team.append(Processes(global_state.client, global_state.process_id, global_state.num_processes, say))
        try:
            yield team[0]
        except BaseException as error:
            team[0].fail(error)
            raise
        finally:
            team[0].close()
            jax.distributed.shutdown()


def check_flags(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """RefusedError for numbers that cannot be, and for a port that is taken, over which the service would crash."""
    problems = []
    if processes is not None and processes < 1:
        problems.append(f"--processes {processes}: give at least 1")
    if process is not None and not 0 <= process < (processes or process + 1):
        problems.append(f"--process {process}: processes are numbered from 0 to --processes - 1")
    if coordinator is not None:
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            problems.append(f"--coordinator {coordinator!r} must be HOST:PORT, where process 0 can be reached")
        elif process == 0 and not is_free(int(port)):
            problems.append(f"--coordinator {coordinator}: the port is taken here; choose another, the same for all")
    if problems:
        raise RefusedError(problems)


def is_free(port: int) -> bool:
    """True where a server can listen at a port of this machine."""
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError:
        return False
    return True


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
