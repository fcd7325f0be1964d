"""Generate: from variants of ops to one readable Triton source file.

The file is self-contained: the tile functions and the device functions they call, verbatim with their comments, then
the worker loop with one branch per variant. Equal input gives the same bytes, so the hash of the source is its name.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import module_from_spec, resolve_name, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
import triton.language as tl
from triton.runtime.jit import ConstexprFunction, JITFunction

from tri_mpk.ops.gemv import drain_ring, start_ring
from tri_mpk.ops.op import KERNEL_PARAMETERS, MACHINE_CONSTANTS, Op
from tri_mpk.ops.panels import start_panels
from tri_mpk.scheduler import by_value, device, peers, rank_timing, ready, timing
from tri_mpk.store import cache_dir, write_whole

TRITON_DTYPES = {
    torch.float32: "tl.float32",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.int8: "tl.int8",
}
TASK_FIELDS = device.TASK_FIELDS.value
# device functions that the worker loop itself calls
USED = (
    "worker_index", "shared_memory", "fetch_task", "await_fetch", "task_address", "wait_counter", "signal",
    "pointer_field", "int_field",
)  # fmt: skip
# a profiled kernel's worker loop calls these too, and its tile functions the second of each pair instead of the first
USED_BY_PROFILE = ("first_record", "begin_step", "begin_record", "read_clock", "end_step")
TIMED = {
    "wait": timing.timed_wait,
    "signal": timing.timed_signal,
    "wait_for_ranks": rank_timing.timed_wait_for_ranks,
    "wait_for_any": rank_timing.timed_wait_for_any,
    "signal_ranks": rank_timing.timed_signal_ranks,
}
RELEASING = {"signal": ready.signal_and_release}  # likewise in a kernel with pools
SCHEDULER_MODULES = (device, timing, ready, by_value, peers, rank_timing)


@dataclass(frozen=True, slots=True)
class Variant:
    """An op with its compile-time parameters fixed: one branch of the kernel, shared by all layers that need it."""

    op: Op
    constants: tuple[tuple[str, object], ...]
    pointer_dtypes: tuple[tuple[str, torch.dtype], ...]

    @property
    def reads_panels(self) -> bool:
        return ("PANELS", True) in self.constants


@dataclass(frozen=True, slots=True)
class KernelConstants:
    """Compile-time parameters of the whole kernel."""

    weight_dtype: torch.dtype
    ring: bool  # weights come through rings in shared memory, not by plain loads
    block_n: int
    block_k: int
    portable: bool  # Triton atomics instead of PTX: what the interpreter runs
    profile: bool = False  # tasks leave time stamps: see scheduler/timing.py
    pools: bool = False  # workers take some tasks as they become ready: see scheduler/ready.py
    slot_bytes: int = 0  # of a ring
    prefetch_bytes: int = 0  # of weights at most that a worker has L2 fetch while it waits for attention
    ranks: int = 1  # that run this kernel in step: see scheduler/peers.py


def field_names(op: Op) -> list[str]:
    """The op's fields in descriptor order, from the signature of its tile function."""
    return [p.name for p in op.tile.params if not p.is_constexpr and p.name not in KERNEL_PARAMETERS]


def task_words(ops: Iterable[Op], profile: bool = False, ranks: int = 1) -> int:
    """Size of a task descriptor in int64 words: whole 64-byte lines."""
    if ranks > 1:
        return peers.PEER_TASK_WORDS
    used = TASK_FIELDS + max(len(field_names(op)) for op in ops)
    words = -(-used // 8) * 8
    if profile:
        assert used <= timing.TASK_STAMPS.value, f"a descriptor of {used} words leaves no room for time stamps"
        words = timing.TIMED_TASK_WORDS
    assert 8 * words <= device.DESCRIPTOR_BYTES.value, f"a descriptor of {words} words does not fit shared memory"
    return words


def generate(variants: list[Variant], constants: KernelConstants) -> str:
    """The source text of the kernel module, whose entry point is `megakernel`."""
    words = task_words((v.op for v in variants), constants.profile, constants.ranks)
    roots = [v.op.tile for v in variants] + [start_ring, drain_ring] + [getattr(device, name) for name in USED]
    has_panels = any(v.reads_panels for v in variants)
    if has_panels:
        roots.append(start_panels)
    if constants.profile:
        roots += [getattr(timing, name) for name in USED_BY_PROFILE]
    if constants.pools:
        roots.append(ready.take_ticket)
        if constants.profile:
            roots += [timing.name_worker, device.task_word]
    ranks = []
    if constants.ranks > 1:
        roots.append(peers.wait_counter_of_ranks)
    if constants.ranks > 1 or any(p.name == "RANKS" for v in variants for p in v.op.tile.params):
        ranks.append(f"RANKS = tl.constexpr({constants.ranks})  # run this kernel in step, each on its shard")
    lines = [
        '"""A persistent decode kernel made by tri_mpk. Launch `megakernel` cooperatively, one program per worker.',
        "",
        *(f"variant {i}: {_describe(v)}" for i, v in enumerate(variants)),
        '"""',
        "",
        "import triton",
        "import triton.language as tl",
        "",
        f"TASK_WORDS = tl.constexpr({words})  # int64 words of a task descriptor",
        f"PORTABLE = tl.constexpr({constants.portable})  # waits and signals as Triton atomics, not PTX",
        f"RING = tl.constexpr({constants.slot_bytes})  # bytes of a slot of the weight rings; 0: plain loads",
        f"PREFETCH = tl.constexpr({constants.prefetch_bytes})  # of weights into L2, while attention is awaited",
        f"BLOCK_K = tl.constexpr({constants.block_k})  # columns of a weight tile, where there is no ring",
        *ranks,
        "",
        *(_beside_panels(text) if has_panels else text for text in _definitions(roots, constants)),
        "",
        "",
        "# ---- megakernel ----",
        "",
        "",
        *_kernel(variants, constants),
    ]
    return "\n".join(lines) + "\n"


def _describe(variant: Variant) -> str:
    return f"{variant.op.name}({', '.join(f'{k}={v}' for k, v in variant.constants)})"


PROFILE_ONLY = "# profile"  # ends the lines that only a profiled kernel has
PANELS_ONLY = "# panels"  # those of a kernel some of whose weights come in panels
APART = "(noinline=True)  # but not beside panels"  # follows the decorator of functions that are inlined there
WORKER_LOOP = '''\
@triton.jit
def megakernel(queue_ptr, queue_start_ptr, event_ptr, control_ptr, step_ptr, logits_ptr, mailbox_ptr, first_worker):
    """Worker w runs tasks queue_start[w] to queue_start[w + 1] of the queue once per epoch, until told to stop."""
    worker = worker_index(first_worker, PORTABLE)
    first_task = tl.load(queue_start_ptr + worker).to(tl.int64)
    num_tasks = tl.load(queue_start_ptr + worker + 1) - first_task.to(tl.int32)
    worker_queue_ptr = queue_ptr + first_task * TASK_WORDS
    epoch = tl.load(control_ptr + CONTROL_FIRST_EPOCH).to(tl.int32)
    smem = shared_memory(control_ptr, PORTABLE)
    ring = start_ring(worker_queue_ptr, num_tasks, control_ptr, smem, TASK_WORDS, RING)
    start_panels(smem)  # panels
    turn = 0
    fetch_task(worker_queue_ptr, 0, turn, smem, TASK_WORDS, PORTABLE)
    await_fetch(smem, PORTABLE)
    running = num_tasks > 0
    step = tl.load(control_ptr + CONTROL_FIRST_STEP).to(tl.int32)  # counted from here on: argmax writes step_ptr
    worker_record = first_record(first_task, worker)  # profile
    while running:
        record = begin_step(control_ptr, worker_record, step, PORTABLE)  # profile
        # nothing is hoisted out of the variants: it would hold registers in all of them
        for slot in tl.range(0, num_tasks, num_stages=1, disable_licm=True):
            task = task_address(worker_queue_ptr, slot, turn, smem, TASK_WORDS, PORTABLE)
            next_slot = tl.where(slot + 1 == num_tasks, 0, slot + 1)
            fetch_task(worker_queue_ptr, next_slot, turn + 1, smem, TASK_WORDS, PORTABLE)
            turn ^= 1
            begin_record(task, record + slot + 1, control_ptr, PORTABLE)  # profile
            variant = int_field(task, TASK_VARIANT, PORTABLE)
'''
FIRST_OF_SLOTS = "        # nothing is hoisted"
POOL_LOOP = """\
        slot = num_tasks * 0
        while slot < num_tasks:
            # at least as many as are left: a task from a pool leaves the slot where it is. Nothing is hoisted out of
            # the variants: it would hold registers in all of them
            for _ in tl.range(slot, num_tasks, num_stages=1, disable_licm=True):
                task = task_address(worker_queue_ptr, slot, turn, smem, TASK_WORDS, PORTABLE)
                variant = int_field(task, TASK_VARIANT, PORTABLE)
                taken = slot * 0 - 1
                timed = slot * 0  # profile
                if variant == POOL_VARIANT:
                    taken = take_ticket(task, event_ptr, control_ptr, epoch, PORTABLE)
                if taken >= 0:  # the record of the pool stays where it is
                    later = (task_word(task, POOL_RECORD, PORTABLE) >> 32).to(tl.int32)  # profile
                    timed = record - worker_record + taken + later  # profile
                    fetch_task(queue_ptr, taken.to(tl.int64), turn + 1, smem, TASK_WORDS, PORTABLE)
                    await_fetch(smem, PORTABLE)
                    task = task_address(queue_ptr, taken.to(tl.int64), turn + 1, smem, TASK_WORDS, PORTABLE)
                    begin_record(task, timed, control_ptr, PORTABLE)  # profile
                    variant = int_field(task, TASK_VARIANT, PORTABLE)
                else:
                    slot += 1
                    begin_record(task, record + slot, control_ptr, PORTABLE)  # profile
                    next_slot = tl.where(slot == num_tasks, 0, slot)
                    fetch_task(worker_queue_ptr, next_slot, turn + 1, smem, TASK_WORDS, PORTABLE)
                    turn ^= 1
"""
NO_VARIANT = """\
            elif variant == -1:  # a worker without tasks
                signal(task, event_ptr, PORTABLE)
            else:  # a damaged queue: whoever waits for this task ends the launch
                await_fetch(smem, PORTABLE)
"""
POOL_TASK_END = """\
                if taken >= 0:  # profile
                    name_worker(control_ptr, timed, worker, PORTABLE)  # profile
"""
WITHOUT_TASKS = "variant == -1:  # a worker", "variant < 0:  # a pool with no task left, or a worker"
STEP_END = """\
        # the step event; its count is not worth a register in between
        step_count = tl.load(control_ptr + CONTROL_STEP_COUNT).to(tl.int32)
        step_waits = read_clock(control_ptr + CONTROL_CLOCK, PORTABLE)  # profile
        wait_counter(event_ptr, epoch * step_count, -1 - worker_index(first_worker, PORTABLE), control_ptr, PORTABLE)
        end_step(control_ptr, record + num_tasks + 1, step_waits, PORTABLE)  # profile
        running = (tl.load(control_ptr + CONTROL_STOP) == 0) & (tl.load(control_ptr + CONTROL_ABORT) == 0)
        epoch += 1
        step += 1
    drain_ring(ring, RING)
"""
WAIT_FOR_RANKS = "wait_counter(", "wait_counter_of_ranks("


def _kernel(variants: list[Variant], constants: KernelConstants) -> Iterator[str]:
    weight = TRITON_DTYPES[constants.weight_dtype]
    loop, branches = WORKER_LOOP, [*_branches(variants, weight), *NO_VARIANT.splitlines()]
    if constants.pools:
        loop = loop[: loop.index(FIRST_OF_SLOTS)] + POOL_LOOP
        branches = ["    " + line.replace(*WITHOUT_TASKS) for line in branches] + POOL_TASK_END.splitlines()
    step_end = STEP_END.replace(*WAIT_FOR_RANKS) if constants.ranks > 1 else STEP_END
    lines = [*loop.splitlines(), *branches, *step_end.splitlines()]
    left_out = () if constants.profile else (PROFILE_ONLY,)
    left_out += () if any(v.reads_panels for v in variants) else (PANELS_ONLY,)
    return (line for line in lines if not line.endswith(left_out))


def _branches(variants: list[Variant], weight: str) -> Iterator[str]:
    for i, variant in enumerate(variants):
        call = f"{variant.op.tile.__name__}("
        if "ring" in [p.name for p in variant.op.tile.params]:
            call = "ring = " + call
        yield f"            {'if' if i == 0 else 'elif'} variant == {i}:  # {variant.op.name}"
        yield f"                {call}"
        yield from (f"                    {argument}," for argument in _arguments(variant, weight))
        yield "                )"


def _arguments(variant: Variant, weight: str) -> Iterator[str]:
    dtypes = dict(variant.pointer_dtypes)
    constants = dict(variant.constants)
    words = {name: TASK_FIELDS + i for i, name in enumerate(field_names(variant.op))}
    for p in variant.op.tile.params:
        if p.name in KERNEL_PARAMETERS:
            yield p.name
        elif p.name == "WEIGHT":
            yield f"WEIGHT={weight}"
        elif p.name in MACHINE_CONSTANTS and p.is_constexpr:
            yield f"{p.name}={p.name}"
        elif p.is_constexpr:
            yield f"{p.name}={constants[p.name]!r}"
        elif p.name.endswith("_ptr"):
            yield f"{p.name}=pointer_field(task, {words[p.name]}, {TRITON_DTYPES[dtypes[p.name]]}, PORTABLE)"
        elif p.name.endswith("_addr"):
            yield f"{p.name}=task_word(task, {words[p.name]}, PORTABLE)"
        else:
            yield f"{p.name}=int_field(task, {words[p.name]}, PORTABLE)"


def _replaced(module: ModuleType, constants: KernelConstants) -> dict[str, JITFunction]:
    """Device functions whose place is taken by others in a module's calls: ops', and those of who takes the time."""
    if constants.profile and module not in SCHEDULER_MODULES:
        return TIMED
    if constants.pools and (module is timing or module not in SCHEDULER_MODULES):
        return RELEASING
    return {}


def _definitions(roots: list[JITFunction], kernel: KernelConstants) -> Iterator[str]:
    """Constants, then functions, callees before callers, each verbatim from its module but for `_replaced`."""
    functions: dict[str, JITFunction | ConstexprFunction] = {}
    constants: dict[str, tuple[ModuleType, str]] = {"TASK_VARIANT": (device, "TASK_VARIANT")}
    for name in ("CONTROL_FIRST_EPOCH", "CONTROL_FIRST_STEP", "CONTROL_STEP_COUNT", "CONTROL_STOP", "CONTROL_ABORT"):
        constants[name] = (device, name)
    if kernel.pools:
        constants["POOL_VARIANT"] = (ready, "POOL_VARIANT")
        if kernel.profile:
            constants["POOL_RECORD"] = (ready, "POOL_RECORD")

    def visit(fn: JITFunction | ConstexprFunction) -> None:
        if functions.get(fn.__name__) is fn:
            return
        assert fn.__name__ not in functions, f"two device functions are called {fn.__name__}"
        module = sys.modules[fn.__module__]
        for node in ast.walk(_definition(module, fn.__name__)):
            value = getattr(module, node.id, None) if isinstance(node, ast.Name) else None
            value = _replaced(module, kernel).get(getattr(node, "id", None), value)
            if isinstance(value, JITFunction | ConstexprFunction):
                visit(value)
            elif isinstance(value, tl.constexpr):
                home = _home(module, node.id)
                assert constants.setdefault(node.id, (home, node.id))[0] is home, f"two constants are called {node.id}"
        functions[fn.__name__] = fn

    for root in roots:
        visit(root)
    for module, name in sorted(constants.values(), key=lambda c: (c[0].__name__, _definition(*c).lineno)):
        yield _text(module, _definition(module, name), {})
    previous = None
    for fn in functions.values():
        module = sys.modules[fn.__module__]
        yield from ("", "")
        if module is not previous:
            yield from (f"# ---- {module.__name__.removeprefix('tri_mpk.').replace('.', '/')}.py ----", "", "")
        names = {old: new.__name__ for old, new in _replaced(module, kernel).items()}
        yield _text(module, _definition(module, fn.__name__), names)
        previous = module


def _beside_panels(text: str) -> str:
    """Where there are panels, no function with `wgmma` may be called: see ops/panels.py."""
    return text.replace(APART, "")


def _home(module: ModuleType, name: str) -> ModuleType:
    """The module that assigns a constant which `module` may have imported."""
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return _home(sys.modules[resolve_name("." * node.level + node.module, module.__package__)], name)
    return module


_TREES: dict[str, ast.Module] = {}


def _tree(module: ModuleType) -> ast.Module:
    if module.__name__ not in _TREES:
        _TREES[module.__name__] = ast.parse(inspect.getsource(module))
    return _TREES[module.__name__]


def _definition(module: ModuleType, name: str) -> ast.stmt:
    for node in _tree(module).body:
        names = (
            [getattr(t, "id", None) for t in node.targets]
            if isinstance(node, ast.Assign)
            else [getattr(node, "name", None)]
        )
        if name in names:
            return node
    raise AssertionError(f"{name} is not defined at the top of {module.__name__}")


def _text(module: ModuleType, node: ast.stmt, renamed: dict[str, str]) -> str:
    """The lines of a definition, with some names replaced."""
    first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
    lines = inspect.getsource(module).split("\n")[first - 1 : node.end_lineno]
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in renamed]
    for name in sorted(names, key=lambda n: n.col_offset, reverse=True):  # columns before it stay what they are
        line = lines[name.lineno - first].encode()
        new = line[: name.col_offset] + renamed[name.id].encode() + line[name.end_col_offset :]
        lines[name.lineno - first] = new.decode()
    return "\n".join(lines)


def write_source(source: str) -> Path:
    """The file of this source, written unless it is there already; its name is the hash of its text."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = cache_dir() / f"megakernel_{digest}.py"
    if not path.exists() or path.read_text() != source:
        write_whole(path, source)
    return path


def import_source(path: Path) -> ModuleType:
    """Imported, not exec'd, so that tracebacks and PTX line tables point at the file."""
    if path.stem in sys.modules:
        return sys.modules[path.stem]
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
