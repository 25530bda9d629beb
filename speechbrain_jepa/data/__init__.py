"""Finding audio (scan, manifest), reading it (audio, crops), and a generated corpus (demo)."""

from speechbrain_jepa.data.audio import UnreadableAudio
from speechbrain_jepa.data.crops import CropBatch, CropDataset, read_crop
from speechbrain_jepa.data.decoded import decode_once
from speechbrain_jepa.data.demo import default_demo_folder, make_demo_corpus
from speechbrain_jepa.data.manifest import Manifest
from speechbrain_jepa.data.sampler import CropSampler, MixedCropSampler, crop_loader
from speechbrain_jepa.data.scan import read_csv, scan_folder
from speechbrain_jepa.data.skipped import SkippedFiles
from speechbrain_jepa.data.split import cut_segments, split_held_out
from speechbrain_jepa.data.workers import choose_workers

__all__ = [
    "CropBatch",
    "CropDataset",
    "CropSampler",
    "Manifest",
    "MixedCropSampler",
    "SkippedFiles",
    "UnreadableAudio",
    "choose_workers",
    "crop_loader",
    "cut_segments",
    "decode_once",
    "default_demo_folder",
    "make_demo_corpus",
    "read_crop",
    "read_csv",
    "scan_folder",
    "split_held_out",
]
