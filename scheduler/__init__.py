"""From a task graph to queues that are proved correct: events, static queues, verify."""

from .errors import (
    CountError,
    DeadlockError,
    MalformedScheduleError,
    RaceError,
    ScheduleError,
    StepOverlapError,
    UnwrittenReadError,
)
from .events import TooManySignals, derive_events
from .graph import (
    MAX_SIGNALS,
    STEP_EVENT,
    Address,
    Box,
    Event,
    Events,
    Region,
    Schedule,
    Task,
    TaskGraph,
    TensorInfo,
    WeightStream,
)
from .queues import OpBalance, imbalance, schedule
from .verify import Report, verify

__all__ = [
    "Address",
    "Box",
    "CountError",
    "DeadlockError",
    "Event",
    "Events",
    "MAX_SIGNALS",
    "MalformedScheduleError",
    "OpBalance",
    "RaceError",
    "Region",
    "Report",
    "STEP_EVENT",
    "Schedule",
    "ScheduleError",
    "StepOverlapError",
    "Task",
    "TaskGraph",
    "TensorInfo",
    "TooManySignals",
    "UnwrittenReadError",
    "WeightStream",
    "derive_events",
    "imbalance",
    "schedule",
    "verify",
]
