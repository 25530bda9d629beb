"""An ONNX file in onnxruntime beside AudioJEPA in torch: seconds, and how far apart they are.

    python benchmarks/onnx_file.py tiny my_audio/ --files 150

Files are read before the clock starts, and go through both one by one and padded in batches.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch.nn.utils.rnn import pad_sequence

from speechbrain_jepa import AudioJEPA
from speechbrain_jepa.data.clips import find_audio, read_audio
from speechbrain_jepa.onnx_export import export_onnx


@torch.inference_mode()
def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("encoder", help="what AudioJEPA takes")
    parser.add_argument("folder", help="of audio")
    parser.add_argument("--files", type=int, default=150, help="so many, evenly spread")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    files = find_audio([options.folder])
    files = files[:: max(len(files) // options.files, 1)][: options.files]
    wavs = [read_audio(file) for file in files]
    seconds = sum(map(len, wavs)) / 16_000
    print(
        f"{len(wavs)} files, {seconds:.0f} s, {options.threads} threads, torch", torch.__version__
    )
    model = AudioJEPA(options.encoder)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(model, Path(folder) / "encoder.onnx", half=True)
        print(f"{path.stat().st_size / 1e6:.1f} MB with float16 weights")
        session = onnxruntime.InferenceSession(str(path), settings, ["CPUExecutionProvider"])
    wavs.sort(key=len)
    print("batch  onnxruntime, s  torch, s  steps apart  clip embeddings apart")
    for size in (1, 16):
        clock, apart = np.zeros(2), np.zeros(2)
        for start in range(0, len(wavs), size):
            some = wavs[start : start + size]
            lengths = torch.tensor([len(wav) for wav in some])
            wav = pad_sequence(some, batch_first=True)
            began = time.perf_counter()
            feed = {"waveform": wav.numpy(), "lengths": lengths.numpy()}
            ours = session.run(["steps", "clip_embedding"], feed)
            between = time.perf_counter()
            steps = model(wav, lengths.double() / wav.shape[1])
            clock += between - began, time.perf_counter() - between
            theirs = steps, model.embed(wav, lengths.double() / wav.shape[1])
            found = [np.abs(a - b.numpy()).max() for a, b in zip(ours, theirs)]
            apart = np.maximum(apart, found)
        print(f"{size:5} {clock[0]:15.2f} {clock[1]:9.2f} {apart[0]:12.1e} {apart[1]:22.1e}")


if __name__ == "__main__":
    main()
