"""The edits of the account: what they change in packed queues, and all that they leave alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tri_mpk.account import EDITS, SKIPPED, Queues, edited
from tri_mpk.generator import field_names
from tri_mpk.geometries import geometry
from tri_mpk.inspect import plan_config
from tri_mpk.model import CausalLM
from tri_mpk.scheduler import device as words

STREAM = words.TASK_STREAM.value
VARIANT, WAIT_COUNT = words.TASK_VARIANT.value, words.TASK_WAIT_COUNT.value


class OnAGpu(torch.Tensor):
    """A tensor of which `cpu` is a copy, as if it were on a GPU."""

    def cpu(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).clone()


@pytest.fixture(scope="module")
def model() -> CausalLM:
    """What the edits need of a model, as if its tensors lay one after another."""
    config = geometry("Qwen3-0.6B")
    config.num_hidden_layers = 2
    program = plan_config(config, torch.bfloat16, 256, num_workers=8)
    packed = program.pack()
    addresses = {name: (i + 1) << 32 for i, name in enumerate(packed.tensor_names)}
    runtime = SimpleNamespace(
        queue=torch.from_numpy(packed.relocate(addresses)).as_subclass(OnAGpu),
        queue_start=torch.from_numpy(packed.queue_start),
    )
    kernel = SimpleNamespace(program=program, runtime=runtime)
    return SimpleNamespace(kernel=kernel, compile=lambda: None, addresses=addresses)


def changed(model: CausalLM, *edits) -> tuple[Queues, torch.Tensor]:
    """The edited queues, and which of their words differ."""
    queues = Queues(model)
    for edit in edits:
        edit(queues)
    return queues, queues.words != model.kernel.runtime.queue.cpu()


def op_of_record(model: CausalLM) -> np.ndarray:
    program = model.kernel.program
    return np.array(
        [program.variants[program.graph.tasks[t].variant].op.name for q in program.schedule.queues for t in q]
    )


def test_records_of_an_op(model):
    queues, names = Queues(model), op_of_record(model)
    for op in set(names):
        assert queues.of_op(op).tolist() == (names == op).tolist()
    two = ["attention", "attention_output"]
    assert set(two) < set(names) and queues.of_op(*two).sum() == np.isin(names, two).sum()
    assert not queues.of_op("no such op").any()


def test_without_waits(model):
    queues, differs = changed(model, Queues.without_waits)
    is_last = torch.from_numpy(op_of_record(model) == "sample")
    assert is_last.sum() == 1 and queues.words[is_last, WAIT_COUNT] > 0
    assert not queues.words[~is_last, WAIT_COUNT].any()
    assert differs[:, WAIT_COUNT].any()
    differs[:, WAIT_COUNT] = False
    assert not differs.any()


def test_without_attention(model):
    queues, differs = changed(model, Queues.without_attention)
    attention = torch.from_numpy(op_of_record(model) == "attention")
    assert attention.any()
    assert (queues.words[attention, VARIANT].to(torch.int32) == SKIPPED).all()
    assert differs[:, VARIANT].equal(attention)
    differs[:, VARIANT] = False
    assert not differs.any()
    assert SKIPPED not in range(len(model.kernel.program.variants))


def test_without_matrices(model):
    queues, differs = changed(model, Queues.without_matrices)
    variants = model.kernel.program.variants
    records = queues.words.tolist()
    emptied = 0
    for record, now, different in zip(model.kernel.runtime.queue.tolist(), records, differs.tolist(), strict=True):
        names = field_names(variants[record[VARIANT] & 0xFFFFFFFF].op)
        places = [words.TASK_FIELDS.value + i for i, name in enumerate(names) if name == "num_rows"]
        assert [i for i, differ in enumerate(different) if differ] == places
        assert all(record[place] > 0 and now[place] == 0 for place in places)
        emptied += len(places)
    graph = model.kernel.program.graph
    assert emptied == sum(task.stream is not None for task in graph.tasks) > 0


def test_without_copies(model):
    """No second matrix and no bytes; addresses and slots stay."""
    queues, differs = changed(model, Queues.without_copies)
    assert not differs[:, : STREAM + 1].any() and not differs[:, STREAM + 3 :].any()
    assert not queues.words[:, STREAM + 1 : STREAM + 3].any()
    assert differs[:, STREAM + 2].sum() == sum(task.stream is not None for task in model.kernel.program.graph.tasks)


def test_cached_weights(model):
    """Every stream begins at its worker's place in the language model's head, and ends in it; its bytes stay."""
    queues, differs = changed(model, Queues.cached_weights)
    program = model.kernel.program
    (lm_head,) = {
        task.stream.start.tensor
        for task in program.graph.tasks
        if task.stream is not None and program.graph.ops[task.op] == "lm_head"
    }
    first = model.addresses[lm_head]
    end = first + 2 * program.tensors[lm_head].numel
    before, now = model.kernel.runtime.queue.tolist(), queues.words.tolist()
    num_streams = moved = 0
    for worker, queue in enumerate(program.schedule.queues):
        start = int(model.kernel.runtime.queue_start[worker])
        place = first + worker * (128 << 10)
        for record, task in enumerate(queue, start):
            stream = program.graph.tasks[task].stream
            if stream is None:
                continue
            num_streams += 1
            moved += before[record][STREAM] != place
            num_bytes = now[record][STREAM + 2]
            assert num_bytes == before[record][STREAM + 2] == 2 * stream.rows * stream.cols
            seconds = [before[record][STREAM + 1], now[record][STREAM + 1]]
            assert now[record][STREAM] == place and place + num_bytes <= end
            assert seconds == [0, 0] if stream.second is None else seconds[1] == place != seconds[0]
    assert moved >= num_streams - 1 > 0  # the first of the head lies there already
    differs[:, STREAM : STREAM + 2] = False
    assert not differs.any()


@pytest.mark.parametrize("name", EDITS)
def test_the_queues_are_as_they_were_afterwards(model, name):
    runtime = model.kernel.runtime
    original, copy = runtime.queue, runtime.queue.cpu()
    with pytest.raises(KeyboardInterrupt), edited(model, EDITS[name]):
        assert runtime.queue is not original
        assert torch.equal(runtime.queue, copy) == (not EDITS[name])
        raise KeyboardInterrupt
    assert runtime.queue is original and torch.equal(original, copy)


def test_edits_are_distinct(model):
    """Each line of the account measures something else."""
    edits = {}
    for name, functions in EDITS.items():
        edits[name] = changed(model, *functions)[0].words.numpy().tobytes()
    assert len(set(edits.values())) == len(EDITS)


def test_without_communication_every_rank_is_its_own_peer():
    from tri_mpk.account import RANK_EDITS
    from tri_mpk.scheduler.descriptor import heap_name
    from tri_mpk.scheduler.peers import TASK_PEERS

    config = geometry("Qwen3-0.6B")
    config.num_hidden_layers = 1
    program = plan_config(config, torch.bfloat16, 256, num_workers=8, world_size=2, rank=1)
    packed = program.pack()
    addresses = {name: (i + 1) << 32 for i, name in enumerate(packed.tensor_names)}
    runtime = SimpleNamespace(
        queue=torch.from_numpy(packed.relocate(addresses)).as_subclass(OnAGpu),
        queue_start=torch.from_numpy(packed.queue_start),
    )
    queues, differs = changed(
        SimpleNamespace(kernel=SimpleNamespace(program=program, runtime=runtime)), *RANK_EDITS["no communication"]
    )
    peers = TASK_PEERS.value
    tasks = [program.graph.tasks[task] for queue in program.schedule.queues for task in queue]
    far = torch.tensor([task.to_all_ranks for task in tasks])
    away = addresses[heap_name(0)] - addresses[heap_name(1)]
    assert set(runtime.queue[far, peers].tolist()) == {away} and set(runtime.queue[far, peers + 1].tolist()) == {0}
    assert bool(differs[far, peers].all()) and int(differs.sum()) == int(far.sum())
    assert bool((queues.words[far, peers : peers + 2] == 0).all())
