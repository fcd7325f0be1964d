"""The proof for graphs with too many combinations of numbers to try: what holds whatever the values are, and what
follows from one value at a time.

1. Nobody waits for ever if nobody does when all tasks wait for all that any numbers could make them wait for, until
   all who could signal it have.
2. A task is certainly done before another if queues and static events say so. Where a value decides who signals, the
   event comes after whoever announces the value if that one precedes all the others. Clocks as in `order.py`.
3. Two accesses that conflict when value x has number n are ordered if (2), with the waits and signals that x = n
   decides, says so, whatever all other values are. Only pairs with no sure write between them have to be looked at:
   what is hidden by such a write precedes it, and whoever comes later follows it.
4. A read is covered if it is for each number of some one value.

Each step is sound, so nothing unsafe passes. Something safe may be refused, where an order follows from several values
together; the error says that it was found so.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable

from .boxes import first_uncovered, intersect
from .errors import RaceError, StepOverlapError, UnwrittenReadError, shared_text
from .graph import Box, Event, Events, Guard, Region, Schedule, Task, TaskGraph
from .guards import GuardedHistory, announcers, guarded_tensors
from .order import Order, derive_order

Edges = dict[int, set[int]]  # from parts of tasks to those that they are done before


class Apart:
    """The step of a graph with values, of which each task is one part that waits for its static event and, where it
    waits by values, another one that does the work.
    """

    def __init__(self, graph: TaskGraph, events: Events, schedule: Schedule, numbers: dict[str, list[int]]) -> None:
        self.graph, self.events, self.schedule = graph, events, schedule
        self.numbers = numbers  # of each value, those that matter
        self.announcers = announcers(graph)
        self.first: list[int] = []
        self.body: list[int] = []
        self.parts = TaskGraph(graph.ops, [], graph.tensors)
        guarded = guarded_tensors(graph)
        for index, task in enumerate(graph.tasks):
            self.first.append(len(self.parts.tasks))
            if index in events.wait_if:
                cells = dict.fromkeys(graph.values[use.guard.value].region for use in events.wait_if[index])
                self.parts.tasks.append(Task(task.op, task.tile, tuple(cells), (), 0))
            self.body.append(len(self.parts.tasks))
            reads, writes = (tuple(r for r in side if r.tensor not in guarded) for side in (task.reads, task.writes))
            self.parts.tasks.append(Task(task.op, task.tile, reads, writes, task.cost_bytes))
        self.queues = Schedule(
            [[part for task in queue for part in self._parts(task)] for queue in schedule.queues],
            [[self.body[task] for task in pool] for pool in schedule.pools],
        )

    def _parts(self, task: int) -> list[int]:
        return [task] if task < 0 else list(range(self.first[task], self.body[task] + 1))

    # ---- what holds whatever the values are ----

    def everything(self) -> tuple[TaskGraph, Events, Schedule]:
        """Guarded waits and signals as if all of them were there. Several waits of a task: as many parts of it."""
        graph, events = self.graph, self.events
        tasks, wait, signals, parts = TaskGraph(graph.ops, [], graph.tensors), [], [], defaultdict(list)
        for index, task in enumerate(graph.tasks):
            some = dict.fromkeys(use.event for use in events.wait_if.get(index, ()))
            waits = [events.wait[index], *some] if some else [events.wait[index]]
            for event in waits:
                parts[index].append(len(tasks.tasks))
                tasks.tasks.append(Task(task.op, task.tile, (), (), 0))
                wait.append(event)
                signals.append([])
            by_value = dict.fromkeys(use.event for use in events.signal_if.get(index, ()))
            signals[-1] = list(dict.fromkeys([*events.signals[index], *by_value]))
        queues = [[p for t in queue for p in (parts[t] if t >= 0 else [t])] for queue in self.schedule.queues]
        pools = [[p for t in pool for p in parts[t]] for pool in self.schedule.pools]
        return tasks, _counted(events, wait, signals), Schedule(queues, pools)

    def order(self) -> tuple[Order, Events]:
        """What is certainly done before what; and the signals that say so."""
        events = self.sure_events({})
        order = derive_order(self.parts, events, self.queues)
        if sure := self._announced_first(order):
            events = self.sure_events(sure)
            order = derive_order(self.parts, events, self.queues)
        return order, events

    def sure_events(self, announced: dict[int, list[int]]) -> Events:
        """Static waits and signals alone, and those of `announced`: events that come after these tasks."""
        wait, signals = [-1] * len(self.parts.tasks), [[] for _ in self.parts.tasks]
        for task, (first, body) in enumerate(zip(self.first, self.body, strict=True)):
            wait[first] = self.events.wait[task]
            signals[body] = [*self.events.signals[task]]
        for event, tasks in announced.items():
            for task in tasks:
                if event not in signals[self.body[task]]:
                    signals[self.body[task]].append(event)
        return _counted(self.events, wait, signals)

    def _announced_first(self, order: Order) -> dict[int, list[int]]:
        """Per event the tasks that announce a value before anybody signals the event by it."""
        by_value: dict[tuple[int, str], set[int]] = defaultdict(set)
        for task, uses in self.events.signal_if.items():
            for use in uses:
                by_value[use.event, use.guard.value].add(task)
        found: dict[int, list[int]] = defaultdict(list)
        for (event, value), tasks in by_value.items():
            who = self.announcers.get(value)
            if who in tasks and all(t == who or order.happens_before(self.body[who], self.first[t]) for t in tasks):
                found[event].append(who)
        return found

    def numbers_of(self, guard: Guard) -> list[int]:
        """Those in which it holds, of the ones that matter."""
        numbers = self.numbers[guard.value]
        lo, hi = bisect_left(numbers, guard.lo), bisect_left(numbers, guard.hi)
        return numbers[:lo] + numbers[hi:] if guard.absent else numbers[lo:hi]


def _counted(events: Events, wait: list[int], signals: list[list[int]]) -> Events:
    """With counts as there are signals: whether they are right has been decided. What counted nothing stays so."""
    sums = [0] * len(events.events)
    for some in signals:
        for event in some:
            sums[event] += 1
    counts = [total if event.count > 0 else event.count for total, event in zip(sums, events.events, strict=True)]
    return Events([Event([], [], count) for count in counts], wait, signals)


def reaches(order: Order, edges: Edges, first: int, second: int) -> bool:
    """Whether `first` is done before `second`, by these edges and the order in turn; not by the order alone."""
    happens_before = order.happens_before
    reached, rest = [first], edges
    while reached:
        part = reached.pop()
        usable = {source for source in rest if source == part or happens_before(part, source)}
        targets = {target for source in usable for target in rest[source]}
        if second in targets or any(happens_before(target, second) for target in targets):
            return True
        rest = {source: found for source, found in rest.items() if source not in usable}
        reached += targets
    return False


# ---- tensors with regions that values guard ----


def check_guarded_regions(apart: Apart, order: Order) -> tuple[int, int]:
    """Races and unwritten reads there; returns how many pairs are ordered and how many reads are covered."""
    graph = apart.graph
    num_pairs = num_reads = 0
    ordered = _GuardedOrder(apart, order)
    histories = {tensor: GuardedHistory() for tensor in guarded_tensors(graph)}
    written: dict[str, _Written] = defaultdict(_Written)
    for index, task in enumerate(graph.tasks):
        reads, writes = ([r for r in side if r.tensor in histories] for side in (task.reads, task.writes))
        ordered.start(index)
        for regions, is_write in ((reads, False), (writes, True)):
            for region in regions:
                sure, conditional = histories[region.tensor].before(region, is_write)
                if sure:
                    ordered.require([(other, None, None) for other in sure])
                if conditional:
                    ordered.require(conditional)
                num_pairs += len(sure) + len(conditional)
        for region in reads:
            if not graph.tensors[region.tensor].initialised:
                _require_written(apart, index, region, written[region.tensor])
                num_reads += 1
        for regions, is_write in ((writes, True), (reads, False)):
            for region in regions:
                histories[region.tensor].record(region, is_write, index, 0)
        for region in writes:
            written[region.tensor].add(region)
    return num_pairs, num_reads


class _Written:
    """What has been written of a tensor so far. What a sure write covers is so for good."""

    def __init__(self) -> None:
        self.sure: dict[Box, None] = {}
        self.some: dict[Region, None] = {}
        self._covered: set[Box] = set()

    def covers(self, box: Box) -> bool:
        """Whether sure writes do."""
        if box not in self._covered:
            near = [other for other in self.sure if intersect(other, box) is not None]
            if first_uncovered(box, near) is not None:
                return False
            self._covered.add(box)
        return True

    def add(self, region: Region) -> None:
        if self.covers(region.box):
            return
        if region.guard is not None:
            self.some[region] = None
            return
        self.sure[region.box] = None
        for old in [old for old in self.some if intersect(old.box, region.box) == old.box]:
            del self.some[old]


class _GuardedOrder:
    """Whether tasks are done before others, by the order that always holds and by what one value decides."""

    def __init__(self, apart: Apart, order: Order) -> None:
        self.apart, self.order = apart, order
        # per value and number, what is done before what then, whether or not it always is
        self._edges: dict[tuple[str, int], Edges] = defaultdict(lambda: defaultdict(set))
        self._cases: dict[Guard, list[tuple[int, Edges]]] = {}
        self._add_edges(apart)

    def _add_edges(self, apart: Apart) -> None:
        events, first, body = apart.events, apart.first, apart.body
        signals, waiting = defaultdict(list), defaultdict(list)
        for task, some in enumerate(events.signals):
            for event in some:
                signals[event].append(body[task])
        for task, event in enumerate(events.wait):
            if event >= 0 and events.events[event].count > 0:
                waiting[event].append(first[task])
        for task, uses in events.wait_if.items():
            for use in uses:
                if events.events[use.event].count > 0:
                    for _, edges in self._cases_of(use.guard):
                        for producer in signals[use.event]:
                            edges[producer].add(body[task])
        for task, uses in events.signal_if.items():
            for use in uses:
                for _, edges in self._cases_of(use.guard):
                    edges[body[task]].update(waiting[use.event])

    def start(self, task: int) -> None:
        """This is the task that `require` is about."""
        self.task, self.part = task, self.apart.body[task]
        self.done = self.order.done_before[self.part].tolist()  # an element of a list is read faster than of an array

    def require(self, others: Iterable[tuple[int, Guard | None, Guard | None]]) -> None:
        """These have to be done before it: by what is always so, or by one of their guards alone."""
        body, done, chain, position = self.apart.body, self.done, self.order.chain, self.order.position
        for other, guard, own in others:
            part = body[other]
            if not (
                done[chain[part]] > position[part]
                or (own is not None and self._exception(part, own) is None)
                or (guard is not None and guard is not own and self._exception(part, guard) is None)
                or other == self.task
            ):
                raise self._race(other, guard)

    def _exception(self, part: int, guard: Guard) -> int | None:
        """A number for which the guard holds and this part of a task may not be done."""
        done, chain, position = self.done, self.order.chain, self.order.position
        for number, edges in self._cases_of(guard):
            for target in edges.get(part, ()):
                if target == self.part or done[chain[target]] > position[target]:
                    break
            else:
                if not reaches(self.order, edges, part, self.part):
                    return number
        return None

    def _cases_of(self, guard: Guard) -> list[tuple[int, Edges]]:
        """The numbers for which it holds, of the ones that matter, and the edges there."""
        if guard not in self._cases:
            numbers = self.apart.numbers_of(guard)
            self._cases[guard] = [(number, self._edges[guard.value, number]) for number in numbers]
        return self._cases[guard]

    def _race(self, first: int, guard: Guard | None) -> RaceError:
        name, second = self.apart.graph.task_name, self.task
        number = None if guard is None else self._exception(self.apart.body[first], guard)
        when = "" if number is None else f" when {guard.value} = {number}"
        return RaceError(
            f"race: {shared_text(self.apart.graph, first, second)}{when}, but it does not follow from one value at a"
            f" time that {name(second)} runs after {name(first)}. Let {name(first)} signal an event that {name(second)}"
            " waits for, whatever the other values are."
        )


def _require_written(apart: Apart, task: int, region: Region, written: _Written) -> None:
    if written.covers(region.box):
        return
    sure = [box for box in written.sure if intersect(box, region.box) is not None]
    hole = first_uncovered(region.box, sure)
    near = [other for other in written.some if intersect(other.box, region.box) is not None]
    for value in dict.fromkeys(other.guard.value for other in near):
        numbers = apart.numbers[value]
        if region.guard is not None and region.guard.value == value:
            numbers = apart.numbers_of(region.guard)
        holds = {n: [o.box for o in near if o.guard.value == value and o.guard.holds(n)] for n in numbers}
        if all(first_uncovered(region.box, [*sure, *boxes]) is None for boxes in holds.values()):
            return
    raise UnwrittenReadError(
        f"unwritten read: {apart.graph.task_name(task)} reads {region.tensor} where, for some numbers of the values, no"
        f" task has written before: it has to be written for every number of one value. First such part: {hole}."
    )


def check_steps(apart: Apart, order: Order) -> None:
    for chain, tasks in enumerate(order.chains):
        for worker in range(order.num_workers):
            done = int(order.done_in_step[worker, chain])
            if done < len(tasks):
                name = apart.parts.task_name(tasks[done])
                raise StepOverlapError(
                    f"{name} ({order.place(tasks[done])}) may still run when worker {worker} begins the next step, for"
                    " some numbers of the values: let it signal the step event (and raise that count by 1)"
                )
