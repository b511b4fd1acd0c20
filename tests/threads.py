"""Optimizers on parts of parameters, each process a thread: every message is looked at, and none needs a network."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from gracile.optim.distributed import ProcessGroup


class Meeting:
    """Where the threads of one group hand over what they send."""

    def __init__(self, size):
        self.size, self.brought = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def exchange(self, index, kind, thing):
        """What each has brought. All must have come for the same."""
        self.brought[index] = (kind, thing)
        self.barrier.wait()
        brought = list(self.brought)
        self.barrier.wait()
        assert {other for other, _ in brought} == {kind}
        return [thing for _, thing in brought]

    def run(self, work):
        """``work(group)`` in each thread; the first failure is raised."""

        def guarded(index):
            try:
                return work(ThreadGroup(self, index))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            jobs = [pool.submit(guarded, index) for index in range(self.size)]
        errors = [job.exception() for job in jobs if job.exception() is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [job.result() for job in jobs]


class ThreadGroup(ProcessGroup):
    def __init__(self, meeting, index):
        self.group, self.index, self.size = meeting, index, meeting.size

    def _all(self, kind, thing):
        return self.group.exchange(self.index, kind, thing)

    def all_reduce_(self, tensor):
        if not tensor.numel():
            return tensor
        return tensor.copy_(torch.stack(self._all(("sum", tensor.shape), tensor.clone())).sum(0))

    def all_reduce_max_(self, tensor):
        if not tensor.numel():
            return tensor
        return tensor.copy_(torch.stack(self._all(("max", tensor.shape), tensor.clone())).amax(0))

    def all_to_all(self, sent, counts, expected):
        assert sum(counts) == sent.numel()
        received = [parts[self.index] for parts in self._all("all to all", torch.split(sent.clone(), counts))]
        assert [part.numel() for part in received] == expected
        return torch.cat(received)

    def all_gather_rows(self, own, count):
        rows = torch.cat(self._all("rows", own.clone()))
        assert len(rows) == count
        return rows

    def broadcast_(self, tensor, owner):
        return tensor.copy_(self._all(("from", owner, tensor.shape), tensor.clone())[owner])


def split(optimizer, cut, processes):
    """Put flat tensors that hold this process's parts in the place of each group's parameters, as an engine does."""
    for group in optimizer.param_groups:
        refs, offset, parts, ranges = optimizer.registry.of_group(group), 0, [], []
        for ref, held in cut(refs, processes.index, processes.size):
            held = replace(held, processes=processes, offset=offset)
            ranges.append((ref, held))
            parts.append(ref.parameter.detach().reshape(-1)[held.start : held.stop])
            offset += held.numel
        flat = torch.nn.Parameter(torch.cat(parts))
        group["params"] = [flat]
        optimizer.registry._ranges[id(flat)] = ranges


def give_gradients(optimizer, gradient_of):
    """``gradient_of(position, shape)`` of whole parameters, where these are split or not."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            ranges = optimizer.registry._ranges.get(id(p))
            if ranges is None:
                p.grad = gradient_of(optimizer.registry.find(p, group).position, p.shape)
            else:
                parts = [gradient_of(r.position, r.shape).view(-1)[h.start : h.stop] for r, h in ranges]
                p.grad = torch.cat(parts)


def weights_of(optimizer):
    """Each parameter, whole, by position. Collective where they are split."""
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            ranges = optimizer.registry._ranges.get(id(p))
            if ranges is None:
                found[optimizer.registry.find(p, group).position] = p.detach().clone()
            else:
                for ref, held in ranges:
                    whole = held.gather(held.of(p.detach()), 0)
                    found[ref.position] = whole
    return found
