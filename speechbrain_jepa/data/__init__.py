"""Audio in: what there is (manifest), reading it (crops), and a corpus made on the spot (demo)."""

from speechbrain_jepa.data.crops import (
    CropBatch,
    CropDataset,
    CropSampler,
    UnreadableAudio,
    crop_loader,
    read_crop,
)
from speechbrain_jepa.data.decoded import decode_once
from speechbrain_jepa.data.demo import default_demo_folder, make_demo_corpus
from speechbrain_jepa.data.manifest import (
    Manifest,
    SkippedFiles,
    read_csv,
    scan_folder,
    split_held_out,
)

__all__ = [
    "CropBatch",
    "CropDataset",
    "CropSampler",
    "Manifest",
    "SkippedFiles",
    "UnreadableAudio",
    "crop_loader",
    "decode_once",
    "default_demo_folder",
    "make_demo_corpus",
    "read_crop",
    "read_csv",
    "scan_folder",
    "split_held_out",
]
