"""What the corpus renders: music through fluidsynth, speech through espeak-ng, drums, mixtures.

Everything is drawn from the generator it is given. Audio is float32, mono, 16 kHz.
"""

import io
import logging
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from sources import DRUM_PRESETS, HELD_OUT_PROGRAMS, HELD_OUT_VOICES

from speechbrain_jepa.data.resampling import resampling_ratio
from speechbrain_jepa.features import SAMPLE_RATE

logger = logging.getLogger(__name__)

PIECE_SECONDS = 10.0
TICKS = 480  # of a MIDI quarter note, which lasts half a second: 960 ticks a second
PROGRAMS = [program for program in range(128) if program not in HELD_OUT_PROGRAMS]
SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 7, 9), (0, 3, 5, 6, 7, 10))
CHORDS = ((0, 4, 7), (0, 3, 7), (0, 4, 7, 10), (0, 3, 7, 10), (0, 5, 7), (0, 7, 12), (0, 3, 6))


def at_level(wav: np.ndarray, decibels: float) -> np.ndarray:
    """With its peak at so many decibels under full scale; silence stays silent."""
    return wav * np.float32(10 ** (decibels / 20) / max(float(np.abs(wav).max(initial=0)), 1e-3))


def to_16k(wav: np.ndarray, rate: int) -> np.ndarray:
    """Mono at 16 kHz of [samples] or [samples, channels]."""
    wav = wav.mean(1) if wav.ndim == 2 else wav
    if rate != SAMPLE_RATE and len(wav):
        resample = torchaudio.transforms.Resample(*resampling_ratio(rate))
        wav = resample(torch.from_numpy(np.ascontiguousarray(wav, np.float32))).numpy()
    return wav.astype(np.float32)


# Music


def _quantity(value: int) -> bytes:
    """A MIDI variable-length quantity."""
    parts = [value & 127]
    while value := value >> 7:
        parts.append(128 | value & 127)
    return bytes(reversed(parts))


def midi_file(events: list[tuple[float, bytes]]) -> bytes:
    """A MIDI file of one track from (second, message)."""
    track, last = b"", 0
    for tick, message in sorted((round(at * 2 * TICKS), message) for at, message in events):
        track += _quantity(tick - last) + message
        last = tick
    track += b"\0\xff\x2f\0"
    header = b"MThd" + struct.pack(">IHHH", 6, 0, 1, TICKS)
    return header + b"MTrk" + struct.pack(">I", len(track)) + track


def _note(channel, key, velocity, start, end):
    key, velocity = int(np.clip(key, 0, 127)), int(np.clip(velocity, 1, 127))
    yield start, bytes((0x90 | channel, key, velocity))
    yield end, bytes((0x80 | channel, key, 0))


def _line(rng, channel, start, end, low, high, beat, scale, root):
    """A melody: steps and leaps on a scale, with rests, repeats and long notes."""
    degrees = [key for key in range(low, high + 1) if (key - root) % 12 in scale]
    place = int(rng.integers(len(degrees)))
    at = start
    while at < end - 0.05:
        length = beat * float(rng.choice([0.5, 1, 1, 2, 3]))
        if rng.random() > 0.12:
            place = int(np.clip(place + rng.integers(-3, 4), 0, len(degrees) - 1))
            if rng.random() < 0.1:
                place = int(rng.integers(len(degrees)))
            hold = min(at + length * rng.uniform(0.4, 1.1), end - 0.02)
            yield from _note(channel, degrees[place], rng.normal(85, 20), at, hold)
        at += length


def _chords(rng, channel, start, end, low, high, beat, scale, root):
    """Chords on the scale, struck or broken."""
    at = start
    while at < end - 0.1:
        length = beat * float(rng.choice([1, 2, 4]))
        base = int(rng.integers(low, max(low + 1, high - 12)))
        base -= (base - root) % 12
        base += int(rng.choice(scale))
        broken = beat / 4 if rng.random() < 0.3 else 0.0
        hold = min(at + length * rng.uniform(0.5, 1.0), end - 0.02)
        for number, interval in enumerate(CHORDS[rng.integers(len(CHORDS))]):
            begin = min(at + number * broken, hold - 0.02)
            yield from _note(channel, base + interval, rng.normal(80, 15), begin, hold)
        at += length


def _single_notes(rng, channel, start, end, *_):
    """Notes alone, of any pitch and length: what a melody's range leaves out."""
    at = start
    while at < end - 0.3:
        length = float(rng.uniform(0.3, 2.5))
        hold = min(at + length, end - 0.02)
        yield from _note(channel, int(rng.integers(21, 109)), rng.integers(40, 128), at, hold)
        at += length + float(rng.uniform(0.0, 0.4))


def _drums(rng, start, end, beat):
    """A pattern of two bars on the drum channel, repeated with slips."""
    keys = [35 + int(k) for k in rng.permutation(47)[:3]] + [36, 38, 42]
    grid = rng.random((len(keys), 16)) < rng.uniform(0.05, 0.4, (len(keys), 1))
    at, step = start, 0
    while at < end - 0.05:
        for key, row in zip(keys, grid):
            if row[step % 16] != (rng.random() < 0.03):
                yield from _note(9, key, rng.normal(90, 20), at, min(at + beat / 4, end - 0.02))
        at, step = at + beat / 4, step + 1


def _part(rng, kind, start, end):
    """One piece of music from `start` to `end`: notes of one program, or a band."""
    beat = 60 / rng.uniform(60, 180)
    scale, root = SCALES[rng.integers(len(SCALES))], int(rng.integers(12))
    styles = (_line, _line, _chords, _single_notes)
    if kind == "notes":
        low = int(rng.integers(24, 84))
        yield from _program(rng, 0, start)
        style = styles[rng.integers(len(styles))]
        yield from style(rng, 0, start, end, low, low + 24, beat, scale, root)
        return
    for channel in range(int(rng.integers(2, 6))):
        low = int(rng.integers(28, 76))
        yield from _program(rng, channel, start)
        style = styles[rng.integers(3)]
        yield from style(rng, channel, start, end, low, low + 19, beat, scale, root)
    if rng.random() < 0.7:
        yield start, bytes((0xC9, DRUM_PRESETS[rng.integers(len(DRUM_PRESETS))]))
        yield from _drums(rng, start, end, beat)


def _program(rng, channel, start):
    # a little before the notes: events of one tick are sorted by their bytes
    before = max(start - 0.01, 0.0)
    yield before, bytes((0xB0 | channel, 7, int(rng.integers(70, 128))))  # volume
    yield before, bytes((0xC0 | channel, PROGRAMS[rng.integers(len(PROGRAMS))]))


def music(rng, kind: str, pieces: int, sound_font: Path) -> list[np.ndarray]:
    """`pieces` pieces of 10 s of "notes" or "bands", rendered in one go.

    The sound font takes a second to load, so a call should ask for several.
    """
    slot = PIECE_SECONDS + 2.0  # the end of a piece rings out before the next
    events = []
    for number in range(pieces):
        start = number * slot + 0.02
        events += _part(rng, kind, start, start + PIECE_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        midi, wav = Path(folder, "score.mid"), Path(folder, "score.wav")
        midi.write_bytes(midi_file(events))
        effects = ["-R", "1", "-C", "0"] if rng.random() < 0.3 else ["-R", "0", "-C", "0"]
        command = ["fluidsynth", "-niq", *effects, "-g", "0.5", "-r", "44100", "-T", "wav"]
        command += ["-F", str(wav), str(sound_font), str(midi)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rendered = to_16k(*soundfile.read(wav, dtype="float32"))
    size, step = round(PIECE_SECONDS * SAMPLE_RATE), round(slot * SAMPLE_RATE)
    cut = [rendered[number * step :][:size] for number in range(pieces)]
    return [at_level(piece, rng.uniform(-24, -1)) for piece in cut]


# Speech


def voices() -> tuple[list[str], list[str]]:
    """espeak-ng's languages, and those of its variants that are not held out."""
    listed = subprocess.run(["espeak-ng", "--voices"], capture_output=True, text=True, check=True)
    languages = sorted({line.split()[1] for line in listed.stdout.splitlines()[1:]})
    listed = subprocess.run(
        ["espeak-ng", "--voices=variant"], capture_output=True, text=True, check=True
    )
    files = (line.split("!v/")[1].strip() for line in listed.stdout.splitlines()[1:])
    names = sorted({file.split("  ")[0] for file in files} - set(HELD_OUT_VOICES))
    return languages, names


def speech(rng, texts: dict[str, list[str]], variants: list[str]) -> np.ndarray:
    """One speaker, sentences or single words of one language, up to 10 s."""
    languages = sorted(texts)
    english = [language for language in languages if language.startswith("en")]
    language = str(rng.choice(english if rng.random() < 0.4 else languages))
    voice = f"{language}+{rng.choice(variants)}" if rng.random() < 0.9 else language
    speed, pitch = int(rng.integers(110, 230)), int(rng.integers(15, 85))
    single_words = rng.random() < 0.4
    parts, seconds = [], 0.0
    while seconds < PIECE_SECONDS:
        text = texts[language][rng.integers(len(texts[language]))]
        if single_words:
            words = text.split()
            text = words[rng.integers(len(words))]
        wav = say(text, voice, speed, pitch)
        gap = np.zeros(round(rng.uniform(0.05, 0.5) * SAMPLE_RATE), np.float32)
        parts += [wav, gap]
        seconds += (len(wav) + len(gap)) / SAMPLE_RATE
    return np.concatenate(parts)[: round(PIECE_SECONDS * SAMPLE_RATE)]


def say(text: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """A text spoken by espeak-ng; nothing where it crashes, as with some texts in some voices."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout"]
    spoken = subprocess.run(command, input=text.encode(), capture_output=True)
    if spoken.returncode < 0:
        logger.warning("left out: espeak-ng in voice %s crashes with %r", voice, text)
        return np.zeros(0, np.float32)
    spoken.check_returncode()
    # the header's length is that of an endless stream
    rate = struct.unpack_from("<I", spoken.stdout, 24)[0]
    samples = np.frombuffer(spoken.stdout[44 : len(spoken.stdout) // 2 * 2], "<i2")
    return to_16k(samples / np.float32(32768), rate)


# Drums


def drum_pattern(rng, sounds: list[np.ndarray]) -> np.ndarray:
    """10 s of a pattern of up to six sounds of one kit."""
    size = round(PIECE_SECONDS * SAMPLE_RATE)
    piece = np.zeros(size, np.float32)
    chosen = [sounds[i] for i in rng.permutation(len(sounds))[: rng.integers(2, 7)]]
    step = 60 / rng.uniform(60, 170) / 4
    steps = int(rng.choice([12, 16, 16, 32]))
    for sound in chosen:
        pattern = rng.random(steps) < rng.uniform(0.06, 0.45)
        level = rng.uniform(0.3, 1.0)
        for number in range(int(PIECE_SECONDS / step)):
            if not pattern[number % steps]:
                continue
            begin = int((number * step + abs(rng.normal(0, 0.004))) * SAMPLE_RATE)
            hit = sound[: size - begin] * level * rng.uniform(0.5, 1.0)
            piece[begin : begin + len(hit)] += hit
    return piece


# Mixtures


def room(rng) -> np.ndarray:
    """Impulse response of a random room: the direct sound, a few echoes, a noise tail."""
    seconds = float(np.exp(rng.uniform(np.log(0.1), np.log(1.2))))  # until 60 dB down
    size = round(seconds * SAMPLE_RATE)
    tail = rng.standard_normal(size) * 10 ** (-3 * np.arange(size) / size)
    tail[: round(0.02 * SAMPLE_RATE)] *= 0.1
    spectrum = np.fft.rfft(tail)  # walls swallow high frequencies
    cutoff = rng.uniform(1_000, 8_000) * 2 * seconds  # in bins
    tail = np.fft.irfft(spectrum / (1 + np.arange(len(spectrum)) / cutoff), size)
    tail *= rng.uniform(0.1, 1.0) / np.sqrt(np.square(tail).sum())
    for _ in range(int(rng.integers(3, 8))):
        place = rng.integers(16, max(17, min(size, 800)))
        tail[place] += rng.uniform(0.1, 0.5) * rng.choice([-1, 1])
    tail[0] = 1.0
    return tail.astype(np.float32)


def in_room(rng, wav: np.ndarray) -> np.ndarray:
    """The sound in a random room, as long as it was."""
    response = room(rng)
    size = 1 << (len(wav) + len(response) - 1).bit_length()
    spectrum = np.fft.rfft(wav, size) * np.fft.rfft(response, size)
    return np.fft.irfft(spectrum, size)[: len(wav)].astype(np.float32)


def mixture(rng, wavs: list[np.ndarray]) -> np.ndarray:
    """The first sound with the others under or over it at -12 to 6 dB, each in a room or not."""
    size = max(map(len, wavs))
    mixed = np.zeros(size, np.float32)
    for number, wav in enumerate(wavs):
        wav = in_room(rng, wav) if rng.random() < 0.6 else wav
        level = np.sqrt(np.square(wav).mean()) + 1e-6
        gain = 0.0 if number == 0 else rng.uniform(-12, 6)
        mixed[: len(wav)] += wav / level * np.float32(0.05 * 10 ** (gain / 20))
    return mixed * np.float32(10 ** (rng.uniform(-12, 6) / 20))


def encode_flac(wav: np.ndarray) -> bytes:
    """16-bit FLAC; what is louder than full scale is turned down."""
    wav = wav / max(1.0, float(np.abs(wav).max()) / 0.98)
    stream = io.BytesIO()
    soundfile.write(stream, wav, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return stream.getvalue()
