"""What the demo corpus' sounds are made of, in vectorised NumPy.

A clip is a `Score`: when notes start, how long they last, how high and how loud they are. A `Line`
turns it into control signals (envelopes, frequency), from which oscillators, noise and resonances
make sound; `record` puts it into a room.
"""

from dataclasses import dataclass

import numpy as np
from scipy import fft, signal

from speechbrain_jepa.features import SAMPLE_RATE

TABLE_SIZE = 4096  # samples of one cycle in a wavetable
HIGHEST = 7_600.0  # Hz: no partial above


@dataclass(frozen=True)
class Score:
    """The notes of one clip, in order of their onsets.

    Arguments
    ---------
    samples : int
        Length of the clip.
    onsets, lengths : array [notes]
        In seconds.
    pitches : array [notes]
        Fundamental frequencies in Hz.
    velocities : array [notes]
        Loudness from 0 to 1.
    """

    samples: int
    onsets: np.ndarray
    lengths: np.ndarray
    pitches: np.ndarray
    velocities: np.ndarray

    def every_other(self, first: int) -> "Score":
        """Every second note: two such lines let a struck note ring on under the next."""
        return Score(
            self.samples,
            self.onsets[first::2],
            self.lengths[first::2],
            self.pitches[first::2],
            self.velocities[first::2],
        )


class Line:
    """A score as control signals: for every sample its note's age, pitch and loudness."""

    def __init__(self, score: Score):
        starts = np.minimum(np.round(score.onsets * SAMPLE_RATE).astype(int), score.samples)
        sizes = np.diff(np.append(starts, score.samples))
        self.score = score
        self.rest = starts[0]  # samples before the first note
        self.note = np.repeat(np.arange(len(starts)), sizes)
        clock = np.arange(len(self.note), dtype=np.float32)
        self.age = (clock - np.repeat(starts - self.rest, sizes)) / np.float32(SAMPLE_RATE)
        self.velocity = self.per_note(score.velocities)

    def per_note(self, values) -> np.ndarray:
        return np.asarray(values, np.float32)[self.note]

    def draw(self, rng, low: float, high: float) -> np.ndarray:
        """One uniform draw per note, held while the note is the current one."""
        return self.per_note(rng.uniform(low, high, len(self.score.onsets)))

    def held(self, attack: float, release: float) -> np.ndarray:
        """Envelope of a blown or bowed note: rises, holds for the note's length, dies away."""
        rise = -np.expm1(-self.age / np.float32(attack))
        after = np.maximum(self.age - self.per_note(self.score.lengths), 0)
        return smooth(rise * np.exp(-after / np.float32(release)), 0.003)

    def struck(self, decay: float | np.ndarray, attack: float = 0.002) -> np.ndarray:
        """Envelope of a plucked or struck note: a fast attack and an exponential decay."""
        return np.minimum(self.age / np.float32(attack), 1) * np.exp(-self.age / decay)

    def frequency(self, glide=0.0, vibrato=0.0, rate=5.0, detune=0.0) -> np.ndarray:
        """Fundamental in Hz; glide in seconds, vibrato and detune in cents, its rate in Hz."""
        octaves = self.per_note(np.log2(self.score.pitches)) + detune / 1200
        if glide:
            octaves = smooth(octaves, glide)
        if vibrato:
            swing = np.sin(2 * np.pi * rate / SAMPLE_RATE * np.arange(len(octaves), dtype="f4"))
            octaves += vibrato / 1200 * swing * np.minimum(self.age / 0.25, 1)
        return np.exp2(octaves)

    def place(self, sound: np.ndarray) -> np.ndarray:
        """The sound behind the silence before the first note, float32 [samples]."""
        return np.concatenate([np.zeros(self.rest, np.float32), sound.astype(np.float32)])


def smooth(x: np.ndarray, seconds: float) -> np.ndarray:
    """One-pole low-pass that starts settled at the first value."""
    pole = np.exp(-1 / (seconds * SAMPLE_RATE))
    return signal.lfilter([1 - pole], [1, -pole], x, zi=[pole * x[0]])[0].astype(np.float32)


def wander(rng, samples: int, rate: float) -> np.ndarray:
    """A slow random curve between 0 and 1 with `rate` new values a second."""
    knots = rng.random(int(samples / SAMPLE_RATE * rate) + 3).astype(np.float32)
    place = np.arange(samples, dtype=np.float32) * np.float32(rate / SAMPLE_RATE)
    left = place.astype(np.int32)
    part = place - left
    part *= part * (3 - 2 * part)
    return knots[left] * (1 - part) + knots[left + 1] * part


def noise(rng, samples: int) -> np.ndarray:
    """White noise of unit deviation; uniform draws cost a third of normal ones."""
    return (rng.random(samples, dtype=np.float32) - np.float32(0.5)) * np.float32(12**0.5)


def band_noise(rng, samples: int, low: float, high: float, order: int = 1) -> np.ndarray:
    """White noise through a Butterworth band, scaled to unit deviation."""
    edges = [max(low, 30.0), min(high, HIGHEST)]
    taps = signal.butter(order, edges, "bandpass", fs=SAMPLE_RATE)
    sound = signal.lfilter(*taps, noise(rng, samples))
    return (sound / (sound.std() + 1e-9)).astype(np.float32)


def cycles(frequency: np.ndarray, start: float = 0.0) -> np.ndarray:
    """Phase in cycles of a frequency in Hz."""
    return start + np.cumsum(frequency, dtype=np.float64) / SAMPLE_RATE


def fraction(phase: np.ndarray) -> np.ndarray:
    """What a phase is beyond whole cycles, float32 (`%` costs five times as much)."""
    return (phase - np.floor(phase)).astype(np.float32)


def sine(phase: np.ndarray) -> np.ndarray:
    return np.sin(np.float32(2 * np.pi) * fraction(phase))


def wavetables(amplitudes: np.ndarray, rng) -> np.ndarray:
    """One cycle for each row of harmonic amplitudes [K, H], the same phases in every row."""
    spectrum = np.zeros((len(amplitudes), TABLE_SIZE // 2 + 1), np.complex64)
    phases = np.exp(2j * np.pi * rng.random(amplitudes.shape[1]))
    spectrum[:, 1 : amplitudes.shape[1] + 1] = amplitudes * phases
    return fft.irfft(spectrum, axis=1) * TABLE_SIZE / 2


def harmonic_sound(phase: np.ndarray, tables: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Read wavetables [K, TABLE_SIZE] at a phase, blended at `position` from 0 to K - 1."""
    column = (fraction(phase) * TABLE_SIZE).astype(np.int32) % TABLE_SIZE
    position = np.clip(position, 0, len(tables) - 1.001)
    row = position.astype(np.int32)
    flat = tables.ravel()
    column += row * TABLE_SIZE
    lower = flat[column]
    column += TABLE_SIZE
    return lower + (position - row) * (flat[column] - lower)


def harmonics(score: Score) -> np.ndarray:
    """Harmonic numbers 1, 2, … that stay below HIGHEST on the score's highest note."""
    return np.arange(1, max(int(HIGHEST / (score.pitches.max() * 1.08)), 3) + 1)


def resonances(frequency: np.ndarray, centres, widths, gains) -> np.ndarray:
    """Magnitude of a sum of resonances, as of an instrument's body or a vocal tract."""
    centres, widths, gains = (np.asarray(x)[:, None] for x in (centres, widths, gains))
    return (gains / np.sqrt(1 + ((frequency - centres) / (widths / 2)) ** 2)).sum(0)


def body(instrument, score: Score, peaks: int = 5, depth: float = 2.0) -> np.ndarray:
    """An instrument's resonances at the harmonics of the score's middle pitch."""
    centres = np.exp(instrument.uniform(np.log(180), np.log(5000), peaks))
    widths = centres * instrument.uniform(0.1, 0.4, peaks)
    gains = instrument.uniform(0.3, depth, peaks)
    frequency = harmonics(score) * np.exp(np.log(score.pitches).mean())
    return 0.5 + resonances(frequency, centres, widths, gains)


def record(sound: np.ndarray, rng) -> np.ndarray:
    """The sound as a microphone in some room hears it.

    A random room (early echoes, an exponential tail), a random loudspeaker-like colour, background
    noise of a random colour at a random signal-to-noise ratio, sometimes mains hum, a random level.

    Arguments
    ---------
    sound : array [samples]
        Of any level.
    rng : numpy.random.Generator

    Returns
    -------
    array [samples], float32
        With a peak between 0.05 and 0.9.
    """
    samples = len(sound)
    decay = rng.uniform(0.05, 0.6)  # seconds to fall by 60 dB
    tail = int(decay * SAMPLE_RATE)
    room = noise(rng, tail) * np.exp(-6.9 * np.arange(tail, dtype=np.float32) / tail)
    room *= rng.uniform(0.02, 0.5) / np.sqrt(np.square(room).sum())
    room[0] = 1.0
    size = fft.next_fast_len(samples + tail, real=True)
    frequency = np.linspace(0, SAMPLE_RATE / 2, size // 2 + 1, dtype=np.float32)
    knots = np.array([0, 150, 500, 1500, 4000, 8000])
    decibels = rng.uniform(-6, 6, len(knots)) + np.linspace(0, rng.uniform(-8, 4), len(knots))
    colour = 10 ** (np.interp(frequency, knots, decibels).astype(np.float32) / 20)
    spectrum = fft.rfft(sound, size) * fft.rfft(room, size) * colour
    sound = fft.irfft(spectrum, size)[:samples]

    slope = rng.uniform(0, 1)  # of the noise's amplitude, 0 is white and 1 is brown
    hiss = noise(rng, 2 * len(frequency)).view(np.complex64) / (frequency + 60) ** slope
    hiss = fft.irfft(hiss, size)[:samples]
    if rng.random() < 0.3:
        hum = rng.choice([50, 60]) / SAMPLE_RATE * np.arange(samples)
        hiss += hiss.std() * rng.uniform(0.3, 1.5) * (sine(hum * 2) + 0.5 * sine(hum * 4))
    snr = rng.uniform(3, 35)
    power, floor = np.square(sound).mean(), np.square(hiss).mean()
    sound = sound + hiss * np.sqrt(power / floor * 10 ** (-snr / 10))
    peak = 10 ** (rng.uniform(-26, -1) / 20)
    return (sound * (peak / (np.abs(sound).max() + 1e-9))).astype(np.float32)
