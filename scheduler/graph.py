"""The task graph: what every task reads, writes and costs. The scheduler knows nothing else about an op.

A `TaskGraph` is in program order: executing its tasks one after another, first to last, defines what the graph means.
Everything else (events, queues, proofs) is derived from the declared regions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

Box = tuple[tuple[int, int], ...]  # half-open interval per dimension


class Guard(NamedTuple):  # a tuple, since verify looks up millions
    """Holds in the steps in which lo <= value < hi; with `absent`, in all other steps. `value` names a `Value`."""

    value: str
    lo: int
    hi: int
    absent: bool = False

    def holds(self, number: int) -> bool:
        return (self.lo <= number < self.hi) != self.absent

    def __str__(self) -> str:
        return f"{'not ' * self.absent}{self.lo} <= {self.value} < {self.hi}"


@dataclass(frozen=True, slots=True)
class Region:
    """A box of one tensor. Two regions conflict when they name the same tensor and their boxes intersect.

    The coordinates are the op's own as long as all ops that touch the tensor agree on them: the KV cache, for example,
    is addressed as (kv_head, split), because which rows a split owns is known only at run time.

    A region with a guard is touched only in steps in which that holds. A tile that has work when there are more than 3
    is guarded by 4 <= num_tiles; a row that an expert id names is one region per id, each guarded by its id.
    """

    tensor: str
    box: Box
    guard: Guard | None = None


@dataclass(frozen=True, slots=True)
class Value:
    """A number that is known only when a step runs, at least `lo` and less than `hi`: an int32 of a tensor.

    At most one task writes it, in every step, before anybody reads it in program order.
    """

    region: Region  # its one element
    lo: int
    hi: int

    @property
    def offset(self) -> int:
        """Elements of the tensor before it."""
        *outer, (offset, _) = self.region.box
        assert all(lo == 0 for lo, _ in outer), f"{self.region} is not in the first row of its tensor"
        return offset


@dataclass(frozen=True, slots=True)
class EventUse:
    """In a field of a task: the place of the table by which its tile function waits or signals by a value.

    `kind` is the device function that takes the place: "wait", "signal" or, for all values it announces, "announce".
    """

    kind: str
    value: str = ""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a pointer field points: `offset` elements into `tensor`. Resolved to an absolute address when packed."""

    tensor: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class WeightStream:
    """The weights a task reads, in order: `rows` consecutive rows of `cols`, and as many from `second` on if it has two
    matrices. `slot_rows` rows are loaded at a time.
    """

    start: Address
    rows: int
    cols: int
    slot_rows: int
    second: Address | None = None


@dataclass(frozen=True, slots=True)
class PanelStream:
    """The weights a task reads by tensor maps, from row `row` of one matrix or of two on: see ops/panels.py."""

    start: Address  # of a tensor map
    second: Address | None
    row: int
    panels: int  # of a slot
    request_bytes: int
    few_only: bool  # not in steps of many tokens


@dataclass(slots=True, eq=False)
class Task:
    """One tile of one op, run by one worker without a break."""

    op: int  # index into TaskGraph.ops
    tile: tuple[int, ...]  # coordinates of the tile within its op, for names and errors
    reads: tuple[Region, ...]
    writes: tuple[Region, ...]
    cost_bytes: int
    variant: int = 0  # branch of the generated kernel
    fields: dict[str, int | Address | EventUse] = field(default_factory=dict)
    stream: WeightStream | None = None
    panels: PanelStream | None = None
    announces: tuple[str, ...] = ()  # values of which it gives the signals of those who are absent
    # of kernels on several ranks, see ranks.py
    pushes: tuple[Region, ...] = ()  # of symmetric tensors, less the first coordinate: written on ranks it reaches
    to_all_ranks: bool = False  # its signals go to the events of all ranks
    ahead: int | None = None  # or to those of one rank: the one so many after its own, modulo the number of ranks

    @property
    def is_far(self) -> bool:
        """Whether it reaches other ranks."""
        return self.to_all_ranks or self.ahead is not None

    def reached(self, rank: int, num_ranks: int) -> tuple[int, ...]:
        """The ranks on which it pushes and signals when it runs on this one."""
        if self.ahead is not None:
            return ((rank + self.ahead) % num_ranks,)
        return tuple(range(num_ranks)) if self.to_all_ranks else (rank,)


@dataclass(slots=True)
class TensorInfo:
    """`initialised`: holds data before the first step (weights, caches, inputs); others must be written before read."""

    dims: tuple[int, ...]
    initialised: bool


@dataclass(slots=True)
class TaskGraph:
    ops: list[str] = field(default_factory=list)  # names for people, e.g. "L03 gate_up", in program order
    tasks: list[Task] = field(default_factory=list)  # program order
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)  # that guards may ask for

    def task_name(self, task: int) -> str:
        """`L03 gate_up t17`"""
        t = self.tasks[task]
        return f"{self.ops[t.op]} t{'.'.join(map(str, t.tile))}"


@dataclass(slots=True)
class Event:
    """A counter that gets `count` increments in every step and that consumers wait for: epoch * count.

    Producers each give one. Where some are guarded, whoever announces the value gives those of the absent, so that the
    sum does not depend on values and no counter is ever reset.
    """

    producers: list[int]  # guarded ones and those who announce included
    consumers: list[int]  # guarded ones included
    count: int


@dataclass(frozen=True, slots=True)
class GuardedEvent:
    """An event that a task waits for or signals in the steps in which the guard holds."""

    event: int
    guard: Guard


@dataclass(frozen=True, slots=True)
class EventTensor:
    """The events of one edge of the op graph: counters `first` to `first + size - 1`, in the order of consumers.

    Where a value is the coordinate, `first + stride * value` is the counter. Other coordinates are constants, folded
    into the descriptors: a static wait is a counter's number.
    """

    producer: str  # ops, as in TaskGraph.ops
    consumer: str
    first: int
    size: int

    def __str__(self) -> str:
        return f"{self.producer} -> {self.consumer} [{self.size}]"


@dataclass(slots=True)
class Events:
    """All events of a graph, and each task's view of them.

    Event 0 is the step event: tasks without a consumer signal it and every worker waits for it before the next step.
    `wait[t]` is the event that task t waits for, or -1; `signals[t]` are the events it signals.
    """

    events: list[Event]
    wait: list[int]
    signals: list[list[int]]
    wait_if: dict[int, list[GuardedEvent]] = field(default_factory=dict)  # after `wait`, in the same step
    signal_if: dict[int, list[GuardedEvent]] = field(default_factory=dict)
    tensors: list[EventTensor] = field(default_factory=list)  # all events but the step event
    num_pairs: int = 0  # (producer, consumer) pairs of tasks that had to be ordered, before sets of them were fused
    max_pairs: int = 0  # the most of one consumer
    weights: list[int] = field(default_factory=list)  # per task: signals that an event gets from it and its like on
    # other ranks; empty on one rank, where that is 1

    def totals(self) -> Counter[int]:
        """The signals that each event gets per step."""
        totals: Counter[int] = Counter()
        for task, signals in enumerate(self.signals):
            for event in signals:
                totals[event] += self.weights[task] if self.weights else 1
        # by a value: every producer signals, or somebody for it
        totals |= {use.event: self.events[use.event].count for uses in self.signal_if.values() for use in uses}
        return totals

    def may_wait(self, task: int) -> list[int]:
        """Events that a task waits for, in all steps or in some."""
        static = [self.wait[task]] if self.wait[task] >= 0 and self.events[self.wait[task]].count > 0 else []
        return [*static, *(use.event for use in self.wait_if.get(task, ()))]

    def may_signal(self, task: int) -> list[int]:
        """Events that a task signals, in all steps or in some."""
        return [*self.signals[task], *dict.fromkeys(use.event for use in self.signal_if.get(task, ()))]


STEP_EVENT = 0
MAX_SIGNALS = 4  # slots of a task descriptor


@dataclass(slots=True)
class Schedule:
    """`queues[w]` are task indices in the order in which worker w runs them.

    `pools[p]` are tasks that no queue holds: whichever worker is free runs the next one that has become ready. Where
    worker w takes part in that, its queue has the entry `pool_entry(p)`; it stays there until none is left to take.
    """

    queues: list[list[int]]
    pools: list[list[int]] = field(default_factory=list)

    def static_queues(self) -> list[list[int]]:
        """The queues without the entries of pools."""
        if not self.pools:
            return self.queues
        return [[entry for entry in queue if entry >= 0] for queue in self.queues]

    def num_entries(self, pool: int) -> int:
        """How many entries of queues let a worker take tasks from a pool."""
        return sum(queue.count(pool_entry(pool)) for queue in self.queues)

    def num_leaving(self) -> int:
        """Workers that take part in any pool: each signals the step event once, when it has left its last one."""
        return sum(any(entry < 0 for entry in queue) for queue in self.queues)


def pool_entry(pool: int) -> int:
    """What stands in a queue for a pool, and back: pool 0 is -1, pool 1 is -2."""
    return -1 - pool
