"""What test_ranks.py runs under torchrun: trainings that note what each rank saw and made.

Environment: EVENT, such as "raise 3" or "kill 2", happens on rank 1 at the end of that step, once.
With --lrd=0 z is the same for each image, so that nothing random enters.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import train_balanced
import train_dcgan
import train_fcgan

SCRIPTS = {m.__name__: m for m in (train_dcgan, train_fcgan, train_balanced)}
seen, numbers, written, own, averaged = [], [], [], [], []
end_step, next_batch, replacing = common.Run.end_step, common.Run.next_batch, common.replacing
sync_grads, randn = common.sync_grads, torch.randn


def noting_end_step(run, stats):
    end_step(run, stats)
    event, step = os.environ.get("EVENT", "none 0").split()
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if common.RANK == 1 and run.step == int(step) and not restarted:
        if event == "raise":
            raise ArithmeticError("rank 1 has had enough")
        os.kill(os.getpid(), signal.SIGKILL)
    nets = {name: run.state[name] for name in ("G", "D", "G_ema")}
    last = -run.steps_per_epoch  # of the last epoch
    made = {
        "step": run.step,
        "own": own,
        "averaged": averaged,
        "weights": {n: list(net.parameters()) for n, net in nets.items()},
        "seen": torch.cat(seen[last:]),
        "numbers": torch.cat(numbers[last:]),
        "written": written,
    }
    torch.save(made, f"{run.folder.name}-{common.WORLD_SIZE}-{common.RANK}.pt")
    own.clear(), averaged.clear()


def noting_next_batch(run, images):
    batch = next_batch(run, images)
    seen.append(batch)
    numbers.append(run.indices)
    return batch


def noting_sync_grads(net):
    own.append([p.grad.clone() for p in net.parameters()])
    sync_grads(net)
    averaged.append([p.grad.clone() for p in net.parameters()])


def noting_replacing(path):
    written.append(str(path))
    return replacing(path)


def same_z(n, dim, device=None, generator=None):
    z = torch.linspace(-1, 1, dim, device=device).expand(n, -1)
    return z if generator is None else randn(n, dim, device=device, generator=generator)


common.Run.end_step, common.Run.next_batch = noting_end_step, noting_next_batch
common.sync_grads, common.replacing = noting_sync_grads, noting_replacing
common.SAVE_AFTER = common.REST = -1  # a checkpoint after every step
torch.set_num_threads(1)
with common.exit_codes():
    for scenario in json.loads(sys.argv[1]):
        torch.randn = same_z if "--lrd=0" in scenario else randn
        SCRIPTS[scenario[0]].train(*scenario[1:])
