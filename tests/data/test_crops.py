"""Reading crops: equal to the whole file's frames, reproducible, and not stopped by bad files."""

import csv
import os
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from speechbrain_jepa.data import (
    CropBatch,
    CropDataset,
    CropSampler,
    Manifest,
    MixedCropSampler,
    UnreadableAudio,
    crop_loader,
    read_crop,
    scan_folder,
)
from speechbrain_jepa.data.crops import read_crops
from speechbrain_jepa.data.resampling import resampled_length, resampling_ratio
from speechbrain_jepa.features import LogMelSpectrogram, crop_samples, num_frames

LOG_MEL = LogMelSpectrogram()
OPUS = {"format": "OGG", "subtype": "OPUS"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in a loader process; these crops are too short for more to help."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def signal(samples, channels=1, seed=0):
    """A glide in noise: every frame differs from every other."""
    rng = np.random.default_rng(seed)
    glide = np.sin(np.cumsum(np.linspace(0.05, 0.6, samples)))
    return 0.3 * glide[:, None] + 0.05 * rng.standard_normal((samples, channels))


def write(path, seconds=1.0, rate=16_000, channels=1, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, signal(round(seconds * rate), channels, seed), rate, **options)
    return path


def whole_log_mel(path, start=0, length=-1):
    """The obvious way: read all of it, average, resample, centred spectrogram [80, frames]."""
    wav, rate = soundfile.read(path, start=start, frames=length, dtype="float32", always_2d=True)
    resample = torchaudio.transforms.Resample(*resampling_ratio(rate))
    return LOG_MEL(resample(torch.from_numpy(wav.mean(1)))[None])[0]


def crop_log_mel(path, first, frames, rate, start, length):
    wav = read_crop(path, first, frames, rate, start, length)
    assert wav.dtype == np.float32 and wav.shape == (crop_samples(frames),)
    return LOG_MEL(torch.from_numpy(wav)[None], margins=True)[0]


def assert_crops_equal_whole(path, tolerance, frames=48, start=0, length=None):
    info = soundfile.info(path)
    length = info.frames - start if length is None else length
    whole = whole_log_mel(path, start, length)
    last = whole.shape[1] - frames
    assert last > 60
    for first in (0, 1, 2, 57, last // 2 + 3, last - 1, last):
        crop = crop_log_mel(path, first, frames, info.samplerate, start, length)
        # of mel power relative to its frame: what float32 rounding moves, quiet bands included
        expected = whole[:, first : first + frames].exp()
        error = (crop.exp() - expected).abs() / expected.amax(0)
        assert error.max() < tolerance, (first, error.max())


@pytest.mark.parametrize("n_fft", [200, 1024])
def test_crops_for_another_window_equal_the_whole_too(tmp_path, n_fft):
    path, log_mel = write(tmp_path / "a.wav"), LogMelSpectrogram(n_fft, n_mels=16)
    whole = log_mel(torch.from_numpy(soundfile.read(path, dtype="float32")[0])[None])[0]
    for first in (0, 1, 2, 3, 40, 51, 52, 53):
        wav = read_crop(path, first, 48, 16_000, 0, 16_000, n_fft)
        crop = log_mel(torch.from_numpy(wav)[None], margins=True)[0]
        torch.testing.assert_close(crop, whole[:, first : first + 48], rtol=1e-5, atol=1e-5)
    manifest, _ = scan_folder(tmp_path, tmp_path / "scan", progress=False)
    batch = CropDataset(manifest, tmp_path, 48, n_fft=n_fft).__getitems__([(0, 0)])
    assert log_mel(batch.wav, margins=True).shape == (1, 16, 48)


RATES = [8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000, 192_000]


# 15 999 and 11 127 Hz have no usable ratio to 16 kHz; 0.2001 s more leave no whole block at the end
@pytest.mark.parametrize("rate", [*RATES, 11_127, 15_999, 44_056])
def test_a_crop_equals_the_same_frames_of_the_whole_file(rate, tmp_path):
    path = write(tmp_path / "a.wav", 1.2001, rate, 2, subtype="FLOAT")
    assert_crops_equal_whole(path, 1e-5)


@pytest.mark.parametrize(
    ("name", "rate", "options", "tolerance"),
    [
        ("a.wav", 44_100, {}, 1e-5),
        ("a.wav", 16_000, {"subtype": "PCM_24"}, 1e-5),
        ("a.flac", 16_000, {}, 1e-5),
        ("a.flac", 48_000, {}, 1e-5),
        ("a.aiff", 22_050, {}, 1e-5),
        ("a.ogg", 44_100, {}, 1e-5),  # Vorbis seeks to the sample
        # mp3 frames lean on those before, decoded afresh after a seek: the last bits differ
        ("a.mp3", 44_100, {}, 1e-4),
        # the decoder runs 80 ms ahead of a seek to settle its predictions, which leaves a trace
        ("a.opus", 48_000, OPUS, 2e-2),
    ],
)
def test_crops_equal_the_whole_file_in_every_format(name, rate, options, tolerance, tmp_path):
    path = write(tmp_path / name, 2.0, rate, 2, **options)
    assert_crops_equal_whole(path, tolerance)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_a_segment_is_cropped_as_if_it_were_a_file(rate, tmp_path):
    path = write(tmp_path / "a.wav", 3.0, rate)
    assert_crops_equal_whole(path, 1e-5, start=rate // 3, length=round(1.3 * rate))


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
@pytest.mark.parametrize("samples", [6007, 8000, 12_345])
def test_a_short_segment_is_followed_by_zeros(rate, samples, tmp_path):
    path = write(tmp_path / "a.wav", samples / rate, rate)
    wav = read_crop(path, 0, 208, rate, 0, samples)
    assert wav.shape == (crop_samples(208),)
    heard = resampled_length(samples, rate)
    assert np.any(wav[200 + heard - 3 : 200 + heard])
    assert not np.any(wav[200 + heard :])
    # up to where the whole file would begin to see its reflection
    frames = num_frames(heard - 200)
    log_mel = LOG_MEL(torch.from_numpy(wav)[None], margins=True)[0]
    assert torch.allclose(log_mel[:, :frames], whole_log_mel(path)[:, :frames], atol=1e-3)


@pytest.mark.parametrize("rate", [11_025, 22_050, 44_100, 96_000, 11_127])
def test_the_resampled_length_is_exact_at_every_length(rate, tmp_path):
    path = write(tmp_path / "a.wav", 3.2, rate)
    for length in range(3 * rate, 3 * rate + 450, 7):
        last = num_frames(resampled_length(length, rate)) - 16
        assert read_crop(path, last, 16, rate, 0, length).shape == (crop_samples(16),)


@pytest.fixture
def frames_read(monkeypatch):
    """Sizes of everything that is decoded."""
    read, sizes = soundfile.SoundFile.read, []

    def counted(self, frames, **options):
        sizes.append(frames)
        return read(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    return sizes


def test_only_what_is_used_is_read(tmp_path, frames_read):
    path = write(tmp_path / "a.wav", 10.0, 44_100)
    read_crop(path, 300, 208, 44_100, 0, 441_000)
    # 92 390 samples of 44.1 kHz are 33 520 of 16 kHz; up to 2 blocks of 441 more at either side
    (samples,) = frames_read
    assert 92_390 <= samples <= 92_390 + 4 * 441


# Several crops of a file


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.ogg"])
def test_crops_from_one_opening_are_those_read_alone(name, rate, tmp_path):
    path = write(tmp_path / name, 10.0, rate, 2)
    # the two ends, one frame twice, overlapping, half a second apart, far apart; in no order
    firsts = [937, 0, 400, 400, 431, 150, 700, 260]
    together = read_crops(path, firsts, 64, rate, 0, 10 * rate)
    assert together.shape == (8, crop_samples(64)) and together.dtype == np.float32
    for crop, first in zip(together, firsts):
        alone = read_crop(path, first, 64, rate, 0, 10 * rate)
        np.testing.assert_allclose(crop, alone, atol=1e-4 if name == "a.mp3" else 2e-6)


@pytest.mark.parametrize("samples", [6007, 12_345])
def test_crops_of_a_short_segment_are_all_the_same(samples, tmp_path):
    path = write(tmp_path / "a.wav", 3.0, 16_000)
    pair = read_crops(path, [0, 0], 208, 16_000, 400, samples)
    assert np.array_equal(pair[0], pair[1])
    assert np.array_equal(pair[0], read_crop(path, 0, 208, 16_000, 400, samples))


def test_what_crops_share_is_decoded_once_and_what_lies_between_is_not(tmp_path, frames_read):
    path = write(tmp_path / "a.wav", 60.0, 16_000)
    # 0 to 3 s in one piece, with the half second between, and 2.08 s far away, with its margins
    read_crops(path, [92, 0, 50, 5_000], 208, 16_000, 0, 960_000)
    assert frames_read == [300 * 160 + 40, 208 * 160 + 240]


def test_a_file_that_cannot_be_sought_in_is_read_from_its_beginning(tmp_path):
    path = write(tmp_path / "a.wav", 10.0, 8_000, subtype="GSM610")
    whole, _ = soundfile.read(path, dtype="float32")
    firsts = [700, 100, 130]
    crops = read_crops(path, firsts, 64, 8_000, 0, 80_000)
    soundfile.write(tmp_path / "b.wav", whole, 8_000, subtype="FLOAT")
    expected = read_crops(tmp_path / "b.wav", firsts, 64, 8_000, 0, 80_000)
    np.testing.assert_allclose(crops, expected, atol=1e-6)


def test_channels_are_averaged(tmp_path):
    wav = signal(16_000, 6)
    soundfile.write(tmp_path / "a.wav", wav, 16_000, subtype="FLOAT")
    crop = read_crop(tmp_path / "a.wav", 10, 16, 16_000, 0, 16_000)
    expected = wav.mean(1)[1400 : 1400 + len(crop)]
    np.testing.assert_allclose(crop, expected, atol=1e-6)


# Bad files


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: round(path.stat().st_size * share)])
    return path


@pytest.mark.parametrize("name", ["a.flac", "a.mp3"])
def test_a_truncated_file_is_unreadable_beyond_its_end(name, tmp_path):
    path = cut(write(tmp_path / name, 10.0, 44_100))
    read_crop(path, 10, 64, 44_100, 0, 441_000)
    for first in (480, 700, 900):
        with pytest.raises(
            UnreadableAudio, match=rf"{name}: (truncated|cannot be decoded)"
        ) as raised:
            read_crop(path, first, 64, 44_100, 0, 441_000)
        assert raised.value.path == str(path)
        assert raised.value.reason


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_unreadable(value, tmp_path):
    wav = signal(32_000)[:, 0]
    wav[20_000] = value
    soundfile.write(tmp_path / "a.wav", wav, 16_000, subtype="FLOAT")
    read_crop(tmp_path / "a.wav", 0, 64, 16_000, 0, 32_000)
    with pytest.raises(UnreadableAudio, match="NaN or infinite"):
        read_crop(tmp_path / "a.wav", 100, 64, 16_000, 0, 32_000)


def test_a_file_that_is_gone_or_has_changed_is_unreadable(tmp_path):
    with pytest.raises(UnreadableAudio, match="cannot be opened: No such file"):
        read_crop(tmp_path / "gone.wav", 0, 64, 16_000, 0, 32_000)
    write(tmp_path / "a.wav", 4.0, 8000)
    with pytest.raises(UnreadableAudio, match="changed since it was scanned: 8000 Hz, was 16000"):
        read_crop(tmp_path / "a.wav", 0, 64, 16_000, 0, 32_000)
    with pytest.raises(UnreadableAudio, match="none at first_frame=401"):
        read_crop(tmp_path / "a.wav", 401, 64, 8000, 0, 32_000)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Good files of every kind, and every kind of bad one. Names of bad ones say where it shows."""
    folder = tmp_path_factory.mktemp("hostile") / "audio"
    for rate in (8000, 16_000, 44_100, 48_000):
        for channels in (1, 2, 6):  # 6 is 5.1
            write(folder / "wav" / f"good {rate} {channels}.wav", 1.0, rate, channels)
    write(folder / "good float.wav", subtype="FLOAT")
    write(folder / "good ünïcode 音.flac", 4.0, 44_100)
    write(folder / "good.ogg", 3.0, 44_100, 2)
    write(folder / "good.OPUS", 3.0, 48_000, **OPUS)
    write(folder / "good.mp3", 3.0, 44_100, 2)
    write(folder / "deep" / "er" / "good.aiff", 3.0, 22_050)
    (folder / "notes.txt").write_text("no audio, and no business of ours")

    (folder / "header empty.wav").touch()
    (folder / "header text.wav").write_text("text")
    (folder / "header noise.flac").write_bytes(np.random.default_rng(0).bytes(5000))
    write(folder / "header short.wav", 10 / 16_000)
    for name in ("cut.wav", "cut.aiff", "cut.ogg"):
        cut(write(folder / f"header {name}", 4.0))
    cut(write(folder / "header cut.opus", 4.0, 48_000, **OPUS))

    # cut so early that no crop of 64 frames fits into what is left
    cut(write(folder / "decode cut.flac", 4.0), 0.1)
    cut(write(folder / "decode cut.mp3", 4.0, 44_100), 0.1)
    soundfile.write(folder / "decode nan.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(folder / "decode inf.wav", np.full(16_000, np.inf), 16_000, subtype="FLOAT")
    damaged = write(folder / "decode zeros.flac", 4.0)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 20 :] = bytes(len(data) - len(data) // 20)
    damaged.write_bytes(data)
    if os.geteuid() != 0:
        write(folder / "header secret.wav").chmod(0)
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_files_are_skipped_listed_once_and_never_stop_the_run(hostile, num_workers, tmp_path):
    manifest, skipped = scan_folder(hostile, tmp_path, progress=False)
    names = [os.path.basename(manifest.path(item)) for item in range(len(manifest))]
    everything = [path.name for path in hostile.rglob("*") if path.is_file()]
    assert sum(name.startswith("good") for name in names) == 18
    assert not any(name.startswith(("header", "notes")) for name in names)
    assert len(skipped) == sum(name.startswith("header") for name in everything)

    dataset = CropDataset(manifest, hostile, crop_frames=64)
    sampler = CropSampler(len(manifest), batch_size=5)
    loader = crop_loader(dataset, sampler, num_workers)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        batches = list(loader)
        assert [len(batch) for batch in batches] == [5] * len(sampler)
        for batch in batches:
            assert torch.isfinite(batch.wav).all()
            assert all(names[item].startswith("good") for item in batch.item)
            for path, reason in batch.failures:
                skipped.add(path, reason)

    with open(tmp_path / "skipped.csv", newline="", encoding="utf-8") as file:
        listed = Counter(row["file"] for row in csv.DictReader(file))
    assert set(listed) == {name for name in everything if name.startswith(("header", "decode"))}
    assert max(listed.values()) == 1


def test_the_run_stops_when_nothing_can_be_read(tmp_path):
    for number in range(3):
        write(tmp_path / "audio" / f"{number}.wav")
    manifest, _ = scan_folder(tmp_path / "audio", tmp_path, progress=False)
    (tmp_path / "audio").rename(tmp_path / "unmounted")
    dataset = CropDataset(manifest, tmp_path / "audio", crop_frames=64)
    with pytest.raises(
        RuntimeError, match=r"33 files in a row .*is data_folder=.*audio still there"
    ):
        dataset.__getitems__([(0, 0)])


# Keys, crops and batches


def manifest_of(path, items=1, seconds=4):
    samples = seconds * 16_000
    return Manifest.from_rows([(str(path), 0, samples, 16_000, samples, 1, 1)] * items)


@pytest.fixture(scope="module")
def ramp(tmp_path_factory):
    """A file whose samples tell their place."""
    path = tmp_path_factory.mktemp("ramp") / "ramp.wav"
    soundfile.write(path, np.arange(64_000, dtype=np.float64) / 2**20, 16_000, subtype="FLOAT")
    return path


def first_frames(batch):
    # sample 200 of a crop is the centre of its first frame
    return [round(place / 160) for place in (batch.wav[:, 200].double() * 2**20).tolist()]


def test_every_start_that_fits_is_equally_likely(ramp):
    frames = num_frames(64_000) - 9  # starts 0 to 9
    dataset = CropDataset(manifest_of(ramp), crop_frames=frames)
    counts = Counter()
    for epochs in range(0, 1000, 100):
        keys = [(epoch, 0) for epoch in range(epochs, epochs + 100)]
        counts.update(first_frames(dataset.__getitems__(keys)))
    assert sorted(counts) == list(range(10))
    chi_square = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001


def test_a_crop_depends_on_seed_epoch_and_item_alone(ramp):
    dataset = CropDataset(manifest_of(ramp, 10), crop_frames=64, seed=1)
    keys = [(epoch, item) for epoch in range(3) for item in range(10)]
    together = dataset.__getitems__(keys)
    backwards = CropDataset(manifest_of(ramp, 10), crop_frames=64, seed=1)
    for row in reversed(range(len(keys))):
        assert torch.equal(backwards[keys[row]].wav[0], together.wav[row])
    starts = first_frames(together)
    assert len(set(starts)) > 20  # 30 draws out of 338 starts
    other = CropDataset(manifest_of(ramp, 10), crop_frames=64, seed=2)
    assert first_frames(other.__getitems__(keys)) != starts


def test_validation_crops_are_the_same_in_every_epoch(ramp):
    dataset = CropDataset(manifest_of(ramp, 10), crop_frames=64, random_crops=False)
    first, later = (dataset.__getitems__([(epoch, item) for item in range(10)]) for epoch in (0, 7))
    assert torch.equal(first.wav, later.wav)


def test_a_replacement_does_not_depend_on_what_was_read_before(tmp_path):
    """A cut-off file gives good crops and bad ones, whoever has met a bad one before."""
    for number in range(6):
        path = write(tmp_path / "audio" / f"{number}.flac", 4.0, seed=number)
        if number % 2:
            cut(path)
    manifest, _ = scan_folder(tmp_path / "audio", tmp_path, progress=False)
    keys = [(epoch, item) for epoch in range(8) for item in range(6)]
    together = CropDataset(manifest, tmp_path / "audio", crop_frames=64).__getitems__(keys)
    assert 0 < len(together.failures) <= 3
    for row, key in enumerate(keys):
        alone = CropDataset(manifest, tmp_path / "audio", crop_frames=64)[key]
        assert torch.equal(alone.wav[0], together.wav[row])
        assert alone.item[0] == together.item[row]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """23 files of several formats and rates."""
    folder = tmp_path_factory.mktemp("corpus") / "audio"
    for number in range(23):
        rate = (16_000, 44_100)[number % 2]
        write(folder / f"{number:02}.{('wav', 'flac', 'mp3')[number % 3]}", 1.0, rate, seed=number)
    manifest, _ = scan_folder(folder, folder.parent / "cache", progress=False)
    return folder, manifest


def batches(corpus, num_workers, plan, **sampling):
    """Batches of (epoch, batches_done) iterations of one loader."""
    folder, manifest = corpus
    sampler = CropSampler(len(manifest), batch_size=4, seed=3, **sampling)
    loader = crop_loader(CropDataset(manifest, folder, 64, seed=3), sampler, num_workers)
    for epoch, batches_done in plan:
        sampler.set_epoch(epoch, batches_done)
        yield list(loader)


def test_crops_are_the_same_with_any_number_of_workers_and_after_a_resume(corpus):
    plan = [(1, 0), (2, 0), (5, 0)]  # set_epoch reaches workers that live on
    expected = list(batches(corpus, 0, plan))
    assert [len(epoch) for epoch in expected] == [5, 5, 5]
    assert not torch.equal(expected[0][0].item, expected[1][0].item)
    for num_workers in (1, 2):
        for epoch, again in zip(expected, batches(corpus, num_workers, plan)):
            for one, other in zip(epoch, again, strict=True):
                assert torch.equal(one.item, other.item) and torch.equal(one.wav, other.wav)
    # killed after three batches of epoch 2, and started with another number of workers
    resumed, after = batches(corpus, 2, [(2, 3), (5, 0)])
    for one, other in zip([*expected[1][3:], *expected[2]], [*resumed, *after], strict=True):
        assert torch.equal(one.item, other.item) and torch.equal(one.wav, other.wav)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_several_crops_of_a_file_are_in_as_many_batches(corpus, num_workers):
    """Each of the crops that as many passes would draw, once; no file twice in a batch; and a
    resume from any batch on goes on with the same ones."""
    folder, manifest = corpus

    def read(plan, crops_per_file, passes):
        options = {"crops_per_file": crops_per_file}
        sampler = CropSampler(23, 4, seed=3, passes=passes, **options)
        dataset = CropDataset(manifest, folder, 64, seed=3, **options)
        loader = crop_loader(dataset, sampler, num_workers)
        for epoch, batches_done in plan:
            sampler.set_epoch(epoch, batches_done)
            found = list(loader)
            assert len(found) + batches_done == len(loader) == len(sampler)
            yield found

    first, second = read([(0, 0), (1, 0)], 3, 1)
    assert len(first) == len(second) == 15  # 5 of 4 different files, 3 crops of each
    for batch in (*first, *second):
        assert batch.wav.shape == (4, crop_samples(64)) and len(set(batch.item.tolist())) == 4
    for start in range(0, 15, 3):
        assert len({tuple(batch.item.tolist()) for batch in first[start : start + 3]}) == 1

    alone = CropDataset(manifest, folder, 64, seed=3)
    seen = set()
    for epoch, found in enumerate((first, second)):
        for number, batch in enumerate(found):
            for wav, item in zip(batch.wav, batch.item.tolist()):
                key = (3 * epoch + number % 3, item)
                torch.testing.assert_close(wav, alone[key].wav[0], atol=1e-4, rtol=0)
                seen.add(key)
    assert len(seen) == 2 * 15 * 4

    for batches_done in (1, 5, 12, 14):
        (resumed,) = read([(1, batches_done)], 3, 1)
        for one, other in zip(second[batches_done:], resumed, strict=True):
            assert torch.equal(one.item, other.item) and torch.equal(one.wav, other.wav)


def test_a_broken_file_gives_its_place_in_every_batch_to_one_other(tmp_path):
    for number in range(4):
        path = write(tmp_path / "audio" / f"{number}.wav", 2.0, subtype="FLOAT", seed=number)
    soundfile.write(path, np.full(32_000, np.nan), 16_000, subtype="FLOAT")
    manifest, _ = scan_folder(tmp_path / "audio", tmp_path, progress=False)
    dataset = CropDataset(manifest, tmp_path / "audio", 64, crops_per_file=3)
    loader = crop_loader(dataset, CropSampler(4, 4, crops_per_file=3))
    for batches_done in (0, 2):
        dataset._reported.clear()
        loader.batch_sampler.set_epoch(0, batches_done)
        found = list(loader)
        items = {tuple(batch.item.tolist()) for batch in found}
        assert len(found) == 3 - batches_done and len(items) == 1 and 3 not in items.pop()
        assert [len(batch.failures) for batch in found] == [1, 0, 0][: len(found)]


def test_a_loader_whose_halves_disagree_is_refused(corpus):
    folder, manifest = corpus
    dataset = CropDataset(manifest, folder, 64, crops_per_file=2)
    with pytest.raises(ValueError, match="crops_per_file=2 of the dataset, 1 of the sampler"):
        crop_loader(dataset, CropSampler(23, 4))
    with pytest.raises(ValueError, match="crops_per_file=0: must be at least 1"):
        CropDataset(manifest, folder, 64, crops_per_file=0)


def test_workers_decode_on_one_thread(corpus, monkeypatch):
    from speechbrain_jepa.data import sampler

    class Threads(CropDataset):
        def __getitems__(self, keys):
            return torch.get_num_threads()

    monkeypatch.setattr(sampler, "_only", lambda x: x)
    folder, manifest = corpus
    loader = crop_loader(Threads(manifest, folder), CropSampler(len(manifest), 4), 1)
    assert set(loader) == {1}


def test_a_batch_moves_as_one():
    batch = CropBatch(torch.zeros(2, 400), torch.tensor([5, 7]), [("a.wav", "empty")])
    moved = batch.to("meta")
    assert len(moved) == 2
    assert moved.wav.device.type == moved.item.device.type == "meta"
    assert moved.failures == batch.failures


# Sampler


def epoch_of(sampler, epoch=0, batches_done=0):
    sampler.set_epoch(epoch, batches_done)
    return list(sampler)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_an_epoch_without_overlap(world_size):
    samplers = [CropSampler(101, 7, 5, rank, world_size) for rank in range(world_size)]
    assert {len(sampler) for sampler in samplers} == {101 // (7 * world_size)}
    for epoch in (0, 4):
        keys = [key for s in samplers for batch in epoch_of(s, epoch) for key in batch]
        assert len(keys) == 101 // (7 * world_size) * 7 * world_size
        assert len({item for _, item in keys}) == len(keys)
        assert {e for e, _ in keys} == {epoch}


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_share_an_epoch_of_several_crops_a_file(world_size):
    options = {"world_size": world_size, "crops_per_file": 3, "passes": 2}
    samplers = [CropSampler(50, 7, 5, rank, **options) for rank in range(world_size)]
    lists = 100 // (7 * world_size)
    assert {len(sampler) for sampler in samplers} == {3 * lists}
    for epoch in (0, 4):
        keys = [key for s in samplers for batch in epoch_of(s, epoch) for key in batch]
        assert len(keys) == len(set(keys)) == 7 * world_size * lists
        assert {pass_ for pass_, _ in keys} == {2 * epoch, 2 * epoch + 1}
    one = samplers[0]
    for done in range(3 * lists):
        assert epoch_of(one, 4, done) == epoch_of(one, 4)[done // 3 :]


def test_epochs_and_seeds_have_their_own_order():
    first = epoch_of(CropSampler(1000, 10, seed=1))
    assert epoch_of(CropSampler(1000, 10, seed=1)) == first
    items = [item for batch in first for _, item in batch]
    assert sorted(items) == list(range(1000))
    for other in (CropSampler(1000, 10, seed=2), CropSampler(1000, 10, seed=1)):
        again = [item for batch in epoch_of(other, other.seed % 2) for _, item in batch]
        assert sum(a == b for a, b in zip(items, again)) < 10  # one by chance


def test_an_epoch_can_begin_in_its_middle():
    sampler = CropSampler(100, 8, rank=1, world_size=2)
    assert epoch_of(sampler, 3, batches_done=4) == epoch_of(sampler, 3)[4:]
    assert epoch_of(sampler, 3, batches_done=len(sampler)) == []


def test_several_passes_draw_different_crops():
    sampler = CropSampler(10, 4, passes=3)
    keys = [[key for batch in epoch_of(sampler, epoch) for key in batch] for epoch in (0, 1)]
    assert [len(epoch) for epoch in keys] == [28, 28]
    # a key is never met twice, so neither is the crop it stands for
    assert len({*keys[0], *keys[1]}) == 56
    assert set(Counter(item for _, item in keys[0]).values()) <= {2, 3}


def test_a_small_corpus_still_fills_a_batch():
    for rank in (0, 1):
        sampler = CropSampler(3, 8, rank=rank, world_size=2)
        assert [len(batch) for batch in epoch_of(sampler)] == [8] * len(sampler) == [8]
    both = [CropSampler(3, 8, rank=rank, world_size=2) for rank in (0, 1)]
    keys = [key for sampler in both for key in epoch_of(sampler)[0]]
    assert len(set(keys)) == 16
    assert set(Counter(item for _, item in keys).values()) <= {5, 6}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_sees_every_item_once(world_size):
    samplers = [CropSampler(23, 4, 0, rank, world_size, False) for rank in range(world_size)]
    found = [epoch_of(sampler, 9) for sampler in samplers]
    assert [len(rank) for rank in found] == [len(sampler) for sampler in samplers]
    assert sorted(item for rank in found for batch in rank for _, item in batch) == list(range(23))


@pytest.mark.parametrize(
    "options",
    [
        {"num_items": 0},
        {"batch_size": 0},
        {"passes": 0},
        {"crops_per_file": 0},
        {"rank": 2, "world_size": 2},
    ],
)
def test_numbers_that_make_no_sense_are_refused(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}: must"):
        CropSampler(**{"num_items": 10, "batch_size": 2, **options})


# --- several durations ----------------------------------------------------------------------------


def test_rounds_have_each_duration_once_with_equal_tokens_and_every_item_once():
    sampler = MixedCropSampler(70, batch_size=2, frames=(16, 32, 64), seed=5)
    sampler.set_epoch(1)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 15  # 70 items in rounds of 14
    orders = set()
    for start in range(0, 15, 3):
        frames = [batch[0][2] for batch in batches[start : start + 3]]
        assert sorted(frames) == [16, 32, 64]
        assert [len(batch) * batch[0][2] for batch in batches[start : start + 3]] == [128] * 3
        orders.add(tuple(frames))
    assert len(orders) > 1  # not always in the same order
    items = [item for batch in batches for _, item, _ in batch]
    assert sorted(items) == list(range(70))
    assert all(len({key[2] for key in batch}) == 1 for batch in batches)
    sampler.set_epoch(2)
    assert list(sampler) != batches


@pytest.mark.parametrize("done", [0, 1, 2, 3, 7, 14])
def test_mixed_batches_go_on_where_they_were(done):
    sampler = MixedCropSampler(70, batch_size=2, frames=(16, 32, 64), seed=5)
    whole = list(sampler)
    sampler.set_epoch(0, batches_done=done)
    assert list(sampler) == whole[done:]


def test_ranks_have_the_same_durations_and_other_items():
    ranks = [MixedCropSampler(70, 2, (16, 32), seed=5, rank=r, world_size=2) for r in (0, 1)]
    first, second = map(list, ranks)
    assert len(first) == len(second) == 2 * (70 // 12)
    assert [batch[0][2] for batch in first] == [batch[0][2] for batch in second]
    of = [{item for batch in batches for _, item, _ in batch} for batches in (first, second)]
    assert not of[0] & of[1]


def test_a_crop_of_a_keys_own_duration_is_that_of_a_dataset_of_it(tmp_path):
    write(tmp_path / "a.wav", seconds=3)
    manifest, _ = scan_folder(tmp_path, tmp_path / "scan", progress=False)
    mixed, own = (CropDataset(manifest, tmp_path, frames) for frames in (208, 48))
    batch = mixed.__getitems__([(3, 0, 48), (4, 0, 48)])
    assert torch.equal(batch.wav, own.__getitems__([(3, 0), (4, 0)]).wav)


@pytest.mark.parametrize("frames", [(), (0, 16), (16, 16)])
def test_durations_that_cannot_be_are_an_error(frames):
    with pytest.raises(ValueError, match="mixed_frames"):
        MixedCropSampler(70, 2, frames)
