"""One of two processes that train together; test_distributed.py starts both, reads their diaries.

RANK=0 LOCAL_RANK=0 python one_rank.py <folder> <folder of audio>
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from written_out import CLIPS, CROP_FRAMES, REPOSITORY, make_brain, recipe_hparams

EPOCHS, ACCUMULATED, LIMIT = 2, 2, 1.0
# batches of rank 1 whose loss is not finite: the first of the first step, the last of the fourth
RUNS = {"plain": {}, "broken": {0: float("nan"), 7: float("inf")}}

if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    from train import make_loaders

    folder, audio_folder, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=200),
    )
    for name, broken in RUNS.items():
        output = folder / name
        output.mkdir(exist_ok=True)
        data = dict(data_folder=audio_folder, num_workers=0)
        options = dict(batch_size=CLIPS, crop_frames=CROP_FRAMES, **data)
        loaders = make_loaders(recipe_hparams("jepa_unstructured", output, **options))
        brain = make_brain(
            output,
            EPOCHS,
            broken=broken if rank == 1 else {},
            model_seed=rank,  # DDP starts both from rank 0's weights
            grad_accumulation_factor=ACCUMULATED,
            max_grad_norm=LIMIT,
            distributed_backend="gloo",
        )
        brain.fit(brain.counter, *loaders)
        torch.save((brain.start, brain.diary), output / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
