"""Two processes that wait for work: each test sends both of them a function, and gets both answers or fails in time."""

import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE = 2


class Pair:
    """Ranks 0 and 1 of a gloo group.

    `pair(function, *args)` runs `function(rank, *args)` in both and returns their answers, or raises what they raised.
    """

    def __init__(self, folder):
        context = mp.get_context("spawn")
        self._pipes, self._workers = [], []
        for rank in range(SIZE):
            mine, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(rank, (Path(folder) / "store").as_uri(), theirs), daemon=True)
            worker.start()
            theirs.close()
            self._pipes.append(mine)
            self._workers.append(worker)

    def __call__(self, function, *args, timeout=120):
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = [self._answer(rank, timeout) for rank in range(SIZE)]
        failed = [f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(answers) if not good]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def _answer(self, rank, timeout):
        if not self._pipes[rank].poll(timeout):
            self.close()
            return False, f"no answer in {timeout} s"
        try:
            return self._pipes[rank].recv()
        except (EOFError, ConnectionError):
            return True, "gone"

    def close(self):
        for worker in self._workers:
            worker.kill()
            worker.join()


def _work(rank, store, pipe):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=SIZE)
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((True, function(rank, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
