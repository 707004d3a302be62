"""Ray actors that may die: every unit of work is done by one of them, or named as given up.

An actor is a process with a worker of its own, on any machine of a cluster. One that dies, alone or
with its machine, costs the units it had in hand one attempt, and another takes its place. Such a
unit is tried again alone, so that one that kills its actors takes no other with it. What a unit is,
is not known here; a worker must be safe to ask twice for the same one. No torch here.
"""

from __future__ import annotations

import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Annotated, Any, Generic, NamedTuple, Protocol, TypeVar

Unit = TypeVar("Unit")
Asked = TypeVar("Asked", contravariant=True)

_IN_HAND = 2  # of an actor: one is read and written while the other computes
_ATTEMPTS = 3
_FAILED_STARTS = 3
_PATIENCE_S = 60.0
_ANSWER_S = 10.0  # for a machine to take a connection
_MIN_STORE_BYTES = 100 * 2**20  # Ray takes no less than 75 MB


class Worker(Protocol[Asked]):
    """What does units in an actor, up to two at a time in threads of their own."""

    def do(self, unit: Asked) -> None:
        """Do a unit; whatever this raises ends the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RayCluster:
    """Where actors run, how many, and what each of them asks for.

    Attributes:
        device: Where each puts the model, "cuda" or "cpu"; None for where the generator is.
    """

    address: Annotated[
        str | None,
        'Address of a running cluster, as "auto" or "ray://HOST:10001"; by default that of '
        "RAY_ADDRESS, or a cluster on this machine that ends with the run.",
    ] = None
    actors: Annotated[
        int | None, "Number of actors; by default as many as the cluster has room for."
    ] = None
    # Threads decide the last bits of results, so that their number must be the same everywhere.
    cpus: Annotated[
        int | None,
        "CPUs per actor, and threads of torch where the model is on them; by default as many as "
        "this process has threads, or 1 beside a GPU.",
    ] = None
    gpus: Annotated[
        float | None, "GPUs per actor, may be 0.5; by default 1 if the model is on a GPU."
    ] = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.actors is not None and self.actors < 1:
            raise ValueError(f"actors is {self.actors}, expected at least 1")
        if self.cpus is not None and self.cpus < 1:
            raise ValueError(f"CPUs of an actor are {self.cpus}, expected at least 1")
        if self.gpus is not None and self.gpus < 0:
            raise ValueError(f"GPUs of an actor are {self.gpus:g}, expected 0, a share or more")
        if self.device is not None and ":" in self.device:
            raise ValueError(
                f"device is {self.device!r}, expected {self.device.split(':')[0]!r}: Ray gives "
                "every actor GPUs of its own"
            )


class Death(NamedTuple):
    """What became of a unit whose actor died every time."""

    reason: str


def on_actors(
    make: Callable[[], Worker[Unit]],
    units: Sequence[Unit],
    cluster: RayCluster,
    *,
    shared_bytes: int = 0,
) -> Generator[tuple[Unit, Death | None], None, None]:
    """Let every unit be done by some actor; yield each as it is done, with None, or given up.

    Args:
        make: Called once in every actor; its pickle is shared by the actors of a machine.
        units: Given out in this order.
        cluster: Where.
        shared_bytes: Of that pickle, about.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: There is no cluster at the address, or none starts here.
        ValueError: The cluster has no room for an actor.
        OSError: Actors die before they can work, or Ray itself fails.
        Exception: Whatever `make` or a worker raised; all actors are ended then.
    """
    ray = _import_ray()
    # What Ray has to say of dead actors is no result, and does not belong on stdout.
    with redirect_stdout(sys.stderr), _connected(ray, cluster, shared_bytes):
        crew: _Crew[Unit] = _Crew(ray, make, cluster, min(_num_actors(ray, cluster), len(units)))
        try:
            yield from crew.work(units)
        finally:
            crew.end()


class _Task(NamedTuple, Generic[Unit]):
    unit: Unit
    attempt: int = 1


class _Actor(Generic[Unit]):
    """An actor, and the tasks it has in hand."""

    def __init__(self, handle: Any) -> None:  # Any: Ray has no types to rely on
        self.handle = handle
        self.is_ready = self.is_dead = False
        self.tasks: list[_Task[Unit]] = []

    def takes(self, task: _Task[Unit]) -> bool:
        """Return whether there is room: a unit whose actor died before is done alone."""
        is_alone = task.attempt > 1 or any(other.attempt > 1 for other in self.tasks)
        return self.is_ready and len(self.tasks) < (1 if is_alone else _IN_HAND)


class _Crew(Generic[Unit]):
    """The actors of a run."""

    def __init__(
        self, ray: Any, make: Callable[[], object], cluster: RayCluster, size: int
    ) -> None:
        self._ray, self._cluster, self._size = ray, cluster, size
        self._make = ray.put(make)
        self._class = ray.remote(_Served)
        self._actors: list[_Actor[Unit]] = []
        # Answers that are awaited; that of starting has no task.
        self._awaited: dict[Any, tuple[_Actor[Unit], _Task[Unit] | None]] = {}
        self._failed_starts = 0

    def work(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Death | None]]:
        waiting = deque(_Task(unit) for unit in units)
        for _ in range(self._size):
            self._hire()
        while waiting or any(task is not None for _, task in self._awaited.values()):
            self._hand_out(waiting)
            for answer in self._answers():
                actor, task = self._awaited.pop(answer)
                if task is not None:
                    actor.tasks.remove(task)
                error = self._error(answer)
                if error is not None:
                    yield from self._bury(actor, task, error, waiting)
                elif task is None:
                    actor.is_ready, self._failed_starts = True, 0
                else:
                    yield task.unit, None

    def end(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor.handle)

    def _hire(self) -> None:
        handle = self._class.options(
            num_cpus=self._cluster.cpus or 1,
            num_gpus=self._cluster.gpus or 0,
            max_concurrency=_IN_HAND,
        ).remote()
        actor: _Actor[Unit] = _Actor(handle)
        self._actors.append(actor)
        self._awaited[handle.start.remote(self._make)] = (actor, None)

    def _hand_out(self, waiting: deque[_Task[Unit]]) -> None:
        for _ in range(_IN_HAND):  # one to each before a second to any
            for actor in self._actors:
                if waiting and actor.takes(waiting[0]):
                    task = waiting.popleft()
                    actor.tasks.append(task)
                    self._awaited[actor.handle.do.remote(task.unit)] = (actor, task)

    def _answers(self) -> list[Any]:
        answers, _ = self._ray.wait(list(self._awaited), timeout=_PATIENCE_S)
        if not answers and not any(actor.is_ready for actor in self._actors):
            print(
                f"still waiting for the first actor, which asks for {_asked(self._cluster)}; the "
                f"cluster has {_text(self._ray.available_resources())} free",
                file=sys.stderr,
            )
        return list(answers)

    def _error(self, answer: Any) -> Exception | None:
        """Return how an actor died, None if it has answered; raise what its worker raised."""
        errors = self._ray.exceptions
        try:
            self._ray.get(answer)
            return None
        except errors.RayTaskError as error:
            failure = error.cause or error
            if not isinstance(failure, errors.RayError):
                raise failure from error  # under its own name, with the traceback it has there
        except (
            errors.RayActorError,
            errors.NodeDiedError,
            errors.OutOfMemoryError,
            errors.WorkerCrashedError,
        ) as error:
            died: Exception = error
            return died
        except errors.RayError as error:
            failure = error
        raise OSError(
            "Ray could not go on; all machines need the same versions of cytosyn_aug and what it "
            f"uses: {str(failure).splitlines()[0]}"
        )

    def _bury(
        self,
        actor: _Actor[Unit],
        task: _Task[Unit] | None,
        error: Exception,
        waiting: deque[_Task[Unit]],
    ) -> Iterator[tuple[Unit, Death | None]]:
        if not actor.is_dead:
            actor.is_dead = True
            self._actors.remove(actor)
            self._ray.kill(actor.handle)  # it may be out of reach only
            self._hire()
        reason = " ".join(str(error).split())
        if task is None:
            self._failed_starts += 1
            if self._failed_starts == _FAILED_STARTS:
                raise OSError(f"{_FAILED_STARTS} actors in a row died while they began: {reason}")
        elif getattr(error, "preempted", False):  # a machine was taken back; no fault of the unit
            waiting.append(task)
        elif task.attempt < _ATTEMPTS:
            waiting.append(task._replace(attempt=task.attempt + 1))
        else:
            yield task.unit, Death(f"its process died in each of {_ATTEMPTS} attempts: {reason}")


class _Served:
    """A worker as an actor: made after the actor is there, so that errors of that have a name."""

    def start(self, make: Callable[[], Worker[Any]]) -> None:
        self._worker = make()

    def do(self, unit: Any) -> None:
        self._worker.do(unit)


def _import_ray() -> Any:
    # Asked for before Ray is imported, which reads it then.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            'engine ray needs Ray, which is not installed: pip install "cytosyn-aug[ray]"'
        ) from error
    return ray


@contextmanager
def _connected(ray: Any, cluster: RayCluster, shared_bytes: int) -> Iterator[None]:
    """Be connected to a cluster: the one this process is connected to already, or join or start it.

    Only a connection made here is closed in the end, and with it a cluster started here.
    """
    if ray.is_initialized():
        yield
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    settings: dict[str, Any] = {"address": address}
    if address is None:
        settings = {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": _MIN_STORE_BYTES + 2 * shared_bytes,
        }
        if cluster.actors is not None:  # on one machine it is for its user to share its cores
            settings["num_cpus"] = max(os.cpu_count() or 1, cluster.actors * (cluster.cpus or 1))
    else:
        _check_answers(address)
    try:
        ray.init(logging_level="WARNING", **settings)
    except Exception as error:  # a plain one, where Ray does not start in time
        raise ConnectionError(
            f"no connection to Ray at {address or 'this machine'}: {error}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Make sure that something answers at an address; Ray itself asks a wrong one for minutes.

    Raises:
        ConnectionError: Nothing does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # "auto", or what Ray is to judge
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"nothing answers at {address}: {error}; give the address that `ray start --head` said"
        ) from error


def _num_actors(ray: Any, cluster: RayCluster) -> int:
    """Return how many actors there shall be.

    Raises:
        ValueError: No number was given, and the cluster has no room for one.
    """
    if cluster.actors is not None:
        return cluster.actors
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num = sum(_room(machine, cluster) for machine in machines)
    if num < 1:
        raise ValueError(
            f"an actor asks for {_asked(cluster)}, and no machine has that: "
            f"{'; '.join(sorted({_text(machine) for machine in machines}))}; ask for less, or give "
            "the number of actors if the cluster grows when asked"
        )
    return num


def _room(machine: Mapping[str, float], cluster: RayCluster) -> int:
    num = int(machine.get("CPU", 0) // (cluster.cpus or 1))
    return min(num, int(machine.get("GPU", 0) / cluster.gpus)) if cluster.gpus else num


def _asked(cluster: RayCluster) -> str:
    return _text({"CPU": cluster.cpus or 1, "GPU": cluster.gpus or 0})


def _text(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
