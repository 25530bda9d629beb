"""One way to open audio: what every reader makes of it, and what none of them opens."""

import os
import tarfile

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_jepa.data import (
    CropDataset,
    UnreadableAudio,
    decode_once,
    read_crop,
    scan_folder,
    split_held_out,
)
from speechbrain_jepa.data.audio import read_header, read_samples, read_whole
from speechbrain_jepa.data.clips import find_audio, read_audio, read_clips
from speechbrain_jepa.features import LogMelSpectrogram

FROM_THE_BEGINNING = {  # what libsndfile cannot seek in: format, subtype
    "gsm.wav": ("WAV", "GSM610"),
    "gsm.aiff": ("AIFF", "GSM610"),
    "g721.wav": ("WAV", "G721_32"),
    "g721.au": ("AU", "G721_32"),
    "nms.wav": ("WAV", "NMS_ADPCM_32"),
    "sample.xi": ("XI", "DPCM_16"),
}


@pytest.fixture(scope="module", params=FROM_THE_BEGINNING)
def unseekable(request, tmp_path_factory):
    """Three seconds in a folder with three wav files, and as libsndfile decodes it."""
    folder = tmp_path_factory.mktemp("unseekable") / "audio"
    folder.mkdir()
    kind, subtype = FROM_THE_BEGINNING[request.param]
    rng = np.random.default_rng(0)
    for number in range(3):
        soundfile.write(folder / f"{number}.wav", 0.1 * rng.standard_normal(48_000), 16_000)
    wav = 0.3 * np.sin(np.cumsum(np.linspace(0.05, 0.6, 48_000)))
    path = folder / request.param
    soundfile.write(path, wav, 16_000, format=kind, subtype=subtype)
    with soundfile.SoundFile(path) as file:
        assert not file.seekable()
        return path, file.read(file.frames, dtype="float32"), file.samplerate


def test_what_cannot_be_seeked_in_is_read_by_everyone(unseekable, tmp_path):
    path, whole, rate = unseekable
    assert read_header(path) == (len(whole), rate)
    np.testing.assert_array_equal(read_samples(path, 7_000, 9_000, rate), whole[7_000:9_000])
    np.testing.assert_array_equal(read_whole(path)[0], whole)
    manifest, skipped = scan_folder(path.parent, tmp_path, progress=False)
    assert len(manifest) == 4 and len(skipped) == 0
    train, valid = split_held_out(manifest, min_valid=3, data_folder=path.parent)
    assert len(valid) == 3 and len(train) == 1
    batch = CropDataset(manifest, path.parent, 64).__getitems__([(3, item) for item in range(4)])
    assert batch.failures == [] and batch.item.tolist() == [0, 1, 2, 3]
    assert [clip for clips in read_clips(find_audio(path)) for clip in clips.files] == [str(path)]
    assert len(decode_once(manifest, path.parent, tmp_path / "wav", progress=False)) == 4


def test_a_crop_of_what_cannot_be_seeked_in_is_that_of_the_whole(unseekable):
    path, whole, rate = unseekable
    copy = path.with_name("copy of it.flt")
    soundfile.write(copy, whole, rate, format="WAV", subtype="FLOAT")
    for first in (0, 57, 100):
        place = (first, 64, rate, 0, len(whole))
        np.testing.assert_array_equal(read_crop(path, *place), read_crop(copy, *place))
    copy.unlink()


@pytest.mark.parametrize("value", [1.1e10, -1e19, 1e38, -np.inf, np.nan])
@pytest.mark.parametrize("kind", ["wav", "tar"])
def test_a_sample_too_large_to_take_the_power_of_makes_a_file_bad(value, kind, tmp_path):
    folder = tmp_path / "audio"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        soundfile.write(folder / f"{number}.wav", 0.1 * rng.standard_normal(9_000), 16_000)
    wav = 0.1 * rng.standard_normal((9_000, 2))
    wav[4_000] = value
    path = folder / "huge.wav"
    soundfile.write(path, wav, 16_000, subtype="FLOAT")
    reason = r"holds a sample of \d\.\de\+\d\d, beyond 1e\+10 \(full scale is 1\)"
    reason = reason if np.isfinite(value) else "holds NaN or infinite samples"
    for read in (read_whole, read_audio):
        with pytest.raises(UnreadableAudio, match=rf"huge\.wav: {reason}"):
            read(path)
    name = "huge.wav"
    if kind == "tar":
        with tarfile.open(folder / "a.tar", "w") as tar:
            tar.add(path, "huge.wav")
        path.unlink()
        name = "a.tar::huge.wav"
    manifest, skipped = scan_folder(folder, tmp_path / "cache", progress=False)
    (bad,) = (item for item in range(4) if manifest.path(item) == name)
    batch = CropDataset(manifest, folder, 32).__getitems__([(e, bad) for e in range(20)])
    assert [file for file, _ in batch.failures] == [name]
    assert batch.wav.abs().max() <= 1
    _, valid = split_held_out(manifest, min_valid=3, data_folder=folder)
    assert sorted(valid) == [item for item in range(4) if item != bad]
    assert len(decode_once(manifest, folder, tmp_path / "wav", skipped, progress=False)) == 3
    assert f"\n{name}," in (tmp_path / "cache" / "skipped.csv").read_text()


def test_the_largest_sample_allowed_still_has_a_finite_log_mel(tmp_path):
    wav = np.where(np.arange(16_000) % 32 < 16, 1e10, -1e10)
    soundfile.write(tmp_path / "a.wav", wav, 16_000, subtype="FLOAT")
    crop = torch.from_numpy(read_crop(tmp_path / "a.wav", 0, 64, 16_000, 0, 16_000))
    assert LogMelSpectrogram()(crop[None]).isfinite().all()
    assert crop.abs().max() == 1e10  # unscaled 32-bit integers are a fifth of that


def with_rate(path, rate):
    """A good wav whose header says another sample rate."""
    soundfile.write(path, np.zeros(8_000), 16_000)
    data = bytearray(path.read_bytes())
    data[24:28] = rate.to_bytes(4, "little")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("rate", "bound"), [(1, "below 1000"), (999, "below 1000"), (4_200_000, "above 1 000 000")]
)
def test_a_rate_that_no_audio_has_is_refused_by_everyone(rate, bound, tmp_path):
    path = with_rate(tmp_path / "a.wav", rate)
    readers = (read_header, read_whole, read_audio)
    for read in (*readers, lambda path: read_samples(path, 0, 100, rate)):
        with pytest.raises(UnreadableAudio, match=f"not audio: {rate} Hz, {bound} Hz"):
            read(path)


def test_pipes_devices_and_folders_are_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")  # to open it would wait for a writer
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "device.wav").symlink_to("/dev/zero")
    kinds = {"pipe.wav": "a named pipe", "folder.wav": "a folder", "device.wav": "a device"}
    for name, kind in kinds.items():
        for read in (read_header, read_whole, read_audio):
            with pytest.raises(UnreadableAudio, match=f"is {kind}: only regular files"):
                read(tmp_path / name)


def test_pipes_among_the_files_are_listed(tmp_path):
    folder = tmp_path / "audio"
    folder.mkdir()
    soundfile.write(folder / "good.wav", np.zeros(16_000), 16_000)
    os.mkfifo(folder / "pipe.wav")
    os.mkfifo(folder / "pipe.tar")
    manifest, _ = scan_folder(folder, tmp_path / "cache", progress=False)
    assert len(manifest) == 1
    lines = (tmp_path / "cache" / "skipped.csv").read_text().splitlines()
    assert sorted(lines) == [
        "file,reason",
        "pipe.tar,not a regular file",
        "pipe.wav,is a named pipe: only regular files are opened",
    ]
    failures = []
    list(read_clips(find_audio(folder), on_failure=failures.append))
    assert [os.path.basename(failure.path) for failure in failures] == ["pipe.wav"]


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_a_whole_file_that_was_cut_off_is_refused(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(50_000), 16_000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableAudio, match=r"truncated|cannot be decoded"):
        read_whole(path)


def test_names_that_are_no_utf_8_are_read(tmp_path):
    raw = os.path.join(os.fsencode(tmp_path), b"latin-\xe9.wav")
    soundfile.write(tmp_path / "a.wav", np.full(16_000, 0.5), 16_000)
    os.rename(tmp_path / "a.wav", raw)
    (file,) = find_audio(tmp_path)
    assert os.fsencode(file) == raw
    assert len(read_audio(file)) == 16_000
