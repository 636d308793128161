"""What test_ranks.py runs under torchrun: trainings that note what each rank saw and made.

Environment: EVENT, such as "raise 3" or "kill 2", happens on rank 1 at the end of that step, once.
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
seen, written = [], []
log, fetch, replacing = common.Run.log, common.Run.fetch, common.replacing


def noting_log(run, stats):
    log(run, stats)
    event, step = os.environ.get("EVENT", "none 0").split()
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if common.rank() == 1 and run.step == int(step) and not restarted:
        if event == "raise":
            raise ArithmeticError("rank 1 has had enough")
        os.kill(os.getpid(), signal.SIGKILL)
    nets = {name: run.state[name] for name in ("G", "D", "G_ema")}
    made = {
        "step": run.step,
        "grads": {n: [p.grad for p in nets[n].parameters()] for n in ("G", "D")},
        "weights": {n: list(net.parameters()) for n, net in nets.items()},
        "seen": torch.cat(seen[-run.steps_per_epoch :]),  # of the last epoch
        "written": written,
    }
    torch.save(made, f"{run.folder.name}-{common.world_size()}-{common.rank()}.pt")


def noting_fetch(run, images, step):
    batch = fetch(run, images, step)
    seen.append(batch)
    return batch


def noting_replacing(path):
    written.append(str(path))
    return replacing(path)


common.Run.log, common.Run.fetch, common.replacing = noting_log, noting_fetch, noting_replacing
common.SAVE_AFTER = common.REST = -1  # a checkpoint after every step
torch.set_num_threads(1)
with common.exit_codes():
    for scenario in json.loads(sys.argv[1]):
        SCRIPTS[scenario[0]].train(*scenario[1:])
