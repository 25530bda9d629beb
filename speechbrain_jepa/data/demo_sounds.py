"""The sixteen sound classes of the demo corpus.

Each synthesiser takes a `Score` and two random generators: `instrument`, seeded per instrument,
fixes what one instrument keeps (its body, its brightness, its attack), and `rng`, seeded per clip,
what changes from take to take.
"""

import numpy as np

from speechbrain_jepa.data.synthesis import (
    HIGHEST,
    Line,
    Score,
    band_noise,
    body,
    cycles,
    fraction,
    harmonic_sound,
    harmonics,
    noise,
    resonances,
    sine,
    smooth,
    wander,
    wavetables,
)
from speechbrain_jepa.features import SAMPLE_RATE

# -- pitched -----------------------------------------------------------------------------------


def plucked(score, instrument, rng):
    """A plucked string: every harmonic dies at its own rate, and the plectrum clicks."""
    pluck = instrument.uniform(0.08, 0.4)  # where along the string
    decay, damping = instrument.uniform(0.35, 1.2), instrument.uniform(0.25, 0.9)
    slope, click = instrument.uniform(0.6, 1.3), instrument.uniform(0.05, 0.4)
    line = Line(score)
    h = harmonics(score)
    excited = np.abs(np.sin(np.pi * h * (pluck + rng.uniform(-0.02, 0.02)))) / h**slope
    excited *= body(instrument, score)
    ages = np.array([0, 0.03, 0.08, 0.16, 0.3, 0.6, 1.2, 2.4])
    rates = (1 + damping * (h - 1)) / decay
    tables = wavetables(excited * np.exp(-ages[:, None] * rates), rng)
    position = np.interp(line.age, ages, np.arange(len(ages))).astype(np.float32)
    phase = cycles(line.frequency(detune=rng.normal(0, 8)))
    sound = harmonic_sound(phase, tables, position) * np.minimum(line.age / 0.001, 1)
    pick = band_noise(rng, len(sound), 1200, 6000) * line.struck(0.006, 0.0005)
    damped = np.exp(-np.maximum(line.age - line.per_note(score.lengths) * 1.5, 0) / 0.05)
    return line.place((sound + click * pick) * damped * line.velocity)


def bowed(score, instrument, rng):
    """A bowed string: a sawtooth through a body, slow attack, vibrato, rosin noise."""
    slope, attack = instrument.uniform(0.9, 1.4), instrument.uniform(0.05, 0.14)
    rosin, depth = instrument.uniform(0.01, 0.06), instrument.uniform(12, 40)
    rate, glide = instrument.uniform(4.5, 6.5), instrument.uniform(0.01, 0.03)
    line = Line(score)
    h = harmonics(score)
    bright = body(instrument, score, 7, 3.0) / h**slope
    tables = wavetables(np.stack([bright / h**0.8, bright]), rng)
    press = 0.35 + 0.65 * wander(rng, len(line.age), 3)
    frequency = line.frequency(glide, depth * rng.uniform(0.6, 1.3), rate, rng.normal(0, 10))
    frequency *= 1 + 0.002 * (wander(rng, len(line.age), 40) - 0.5)
    sound = harmonic_sound(cycles(frequency), tables, press)
    sound += rosin * band_noise(rng, len(sound), 1000, 5000)
    return line.place(sound * line.held(attack, 0.08) * (0.6 + 0.4 * press) * line.velocity)


def flute(score, instrument, rng):
    """A flute: few harmonics, breath around the tone, a chiff at the start, tremolo."""
    second, third = instrument.uniform(0.1, 0.7), instrument.uniform(0.03, 0.3)
    breath, chiff = instrument.uniform(0.03, 0.16), instrument.uniform(0.1, 0.5)
    attack, rate = instrument.uniform(0.03, 0.08), instrument.uniform(4, 6)
    line = Line(score)
    h = harmonics(score)
    soft = np.where(h == 1, 1.0, np.where(h == 2, second, third / 3.0 ** (h - 3)))
    tables = wavetables(np.stack([soft / h**0.6, soft]), rng)
    swell = 0.5 + 0.5 * wander(rng, len(line.age), 4)
    tremolo = 1 + 0.25 * np.minimum(line.age / 0.3, 1) * np.sin(
        2 * np.pi * rate / SAMPLE_RATE * np.arange(len(line.age), dtype="f4")
    )
    frequency = line.frequency(0.008, rng.uniform(4, 12), rate, rng.normal(0, 10))
    frequency *= 1 - 0.02 * np.exp(-line.age / 0.03)
    sound = harmonic_sound(cycles(frequency), tables, swell)
    middle = np.exp(np.log(score.pitches).mean())
    air = band_noise(rng, len(sound), middle * 0.9, middle * 5)
    held = line.held(attack, 0.05)
    puff = chiff * line.struck(0.03, 0.01) * band_noise(rng, len(sound), 1500, 6000)
    return line.place((sound * tremolo + breath * air) * held * line.velocity + 0.3 * puff)


def reed(score, instrument, rng):
    """A clarinet: odd harmonics, a quick firm attack, no vibrato."""
    even, slope = instrument.uniform(0.02, 0.3), instrument.uniform(0.8, 1.3)
    attack, edge = instrument.uniform(0.015, 0.04), instrument.uniform(0.002, 0.02)
    line = Line(score)
    h = harmonics(score)
    tone = np.where(h % 2 == 1, 1.0, even * np.minimum(h / 8, 1)) / h**slope
    tone *= body(instrument, score, 4, 1.5)
    tables = wavetables(np.stack([tone / h, tone]), rng)
    frequency = line.frequency(0.004, 0, detune=rng.normal(0, 8))
    open_up = np.clip(line.age / 0.06, 0, 1) * (0.6 + 0.4 * wander(rng, len(line.age), 2))
    sound = harmonic_sound(cycles(frequency), tables, open_up)
    sound += edge * band_noise(rng, len(sound), 1500, 7000)
    return line.place(sound * line.held(attack, 0.03) * line.velocity)


def brass(score, instrument, rng):
    """A trumpet or horn: the upper harmonics come in later and leave first."""
    opening, slope = instrument.uniform(0.06, 0.2), instrument.uniform(0.2, 0.9)
    attack, rolloff = instrument.uniform(0.025, 0.07), instrument.uniform(1500, 4000)
    rate, scoop = instrument.uniform(4.5, 6), instrument.uniform(10, 60)
    line = Line(score)
    h = harmonics(score)
    middle = np.exp(np.log(score.pitches).mean())
    full = body(instrument, score, 3, 1.5) / h**slope / (1 + (h * middle / rolloff) ** 2)
    tables = wavetables(np.stack([full / h**p for p in (2.5, 1.5, 0.7, 0)]), rng)
    lip = -np.expm1(-line.age / opening) * line.velocity
    after = np.maximum(line.age - line.per_note(score.lengths), 0)
    lip *= np.exp(-after / 0.04)
    frequency = line.frequency(0.015, rng.uniform(0, 14), rate, rng.normal(0, 10))
    frequency *= np.exp2(-scoop / 1200 * np.exp(-line.age / 0.05))
    sound = harmonic_sound(cycles(frequency), tables, smooth(lip, 0.004) * 3.2)
    sound += 0.03 * band_noise(rng, len(sound), 400, 3000) * np.exp(-line.age / 0.05)
    return line.place(sound * line.held(attack, 0.05) * line.velocity)


def organ(score, instrument, rng):
    """A drawbar organ: steady drawbars, key click, a rotating loudspeaker."""
    drawbars = instrument.choice([0.0, 0.3, 0.6, 1.0], 9)
    drawbars[[0, 2]] = np.maximum(drawbars[[0, 2]], 0.6)
    click, rate = instrument.uniform(0.1, 0.5), instrument.choice([0.9, 5.8, 6.6])
    depth = instrument.uniform(0.05, 0.3)
    line = Line(score)
    # 16', 5 1/3', 8', 4', 2 2/3', 2', 1 3/5', 1 1/3', 1': multiples of half the pitch
    partial = np.array([1, 3, 2, 4, 6, 8, 10, 12, 16])
    amplitude = np.zeros(16)
    amplitude[partial - 1] = drawbars
    amplitude[np.arange(1, 17) * score.pitches.max() / 2 > HIGHEST] = 0
    tables = wavetables(np.stack([amplitude, amplitude * np.linspace(0.6, 1.3, 16)]), rng)
    turn = np.sin(2 * np.pi * rate / SAMPLE_RATE * np.arange(len(line.age), dtype="f4"))
    frequency = line.frequency(detune=rng.normal(0, 5)) * (1 + 0.004 * depth * turn)
    sound = harmonic_sound(cycles(frequency / 2), tables, 0.5 + 0.5 * turn)
    sound *= 1 + depth * turn
    sound += click * noise(rng, len(sound)) * np.exp(-line.age / 0.004)
    return line.place(sound * line.held(0.004, 0.008) * (0.7 + 0.3 * line.velocity))


# First three formants of adult speakers, in Hz (Peterson and Barney, 1952, rounded).
VOWELS = {
    "a": (730, 1090, 2440),
    "e": (530, 1840, 2480),
    "i": (270, 2290, 3010),
    "o": (570, 840, 2410),
    "u": (300, 870, 2240),
}


def voice(score, instrument, rng):
    """A sung vowel that turns into others: glottal pulses through moving formants."""
    tract, tilt = instrument.uniform(0.88, 1.2), instrument.uniform(0.8, 1.4)
    breath, depth = instrument.uniform(0.01, 0.08), instrument.uniform(15, 60)
    rate, glide = instrument.uniform(4.5, 6.5), instrument.uniform(0.02, 0.06)
    line = Line(score)
    h = harmonics(score)
    frequency = h * np.exp(np.log(score.pitches).mean())
    names = rng.permutation(list(VOWELS))[:4]
    rows = []
    for name in names:
        centres = np.array([*VOWELS[name], 3500]) * tract
        rows.append(resonances(frequency, centres, [80, 100, 140, 220], [1, 0.6, 0.35, 0.2]))
    tables = wavetables(np.stack(rows) / h**tilt, rng)
    syllable = line.draw(rng, 0, 3)
    vowel = smooth(syllable, 0.04) + 0.6 * (wander(rng, len(line.age), 2) - 0.5)
    pitch = line.frequency(glide, depth, rate, rng.normal(0, 15))
    pitch *= 1 + 0.006 * (wander(rng, len(line.age), 60) - 0.5)
    sound = harmonic_sound(cycles(pitch), tables, np.maximum(vowel, 0))
    sound += breath * 0.3 * band_noise(rng, len(sound), 800, 5000)
    return line.place(sound * line.held(0.045, 0.06) * line.velocity)


def _ringing(score, strike):
    """Two lines of every other note, so that each rings on under the one that follows."""
    halves = [score.every_other(first) for first in range(min(2, len(score.onsets)))]
    return sum(strike(Line(half)) for half in halves)


def bell(score, instrument, rng):
    """A bell by frequency modulation: inharmonic, bright at the stroke, long to die."""
    ratio = instrument.choice([1.41, 2.76, 3.5, 1.73]) * instrument.uniform(0.98, 1.02)
    index, decay = instrument.uniform(1.0, 4.0), instrument.uniform(0.7, 2.0)
    beat, hum = instrument.uniform(0.3, 3.0), instrument.uniform(0.1, 0.5)
    detune = rng.normal(0, 8)

    def strike(line):
        phase = cycles(line.frequency(detune=detune), rng.random())
        modulation = index * line.velocity * np.exp(-line.age / (decay * 0.35))
        partial = sine(phase * ratio)
        sound = np.sin(np.float32(2 * np.pi) * fraction(phase) + modulation * partial)
        sound *= 1 + 0.3 * np.cos(2 * np.pi * beat * line.age)
        sound += hum * sine(phase * 0.5) + 0.3 * partial * np.exp(-line.age / 0.2)
        return line.place(sound * line.struck(decay, 0.002) * line.velocity)

    return _ringing(score, strike)


def marimba(score, instrument, rng):
    """A struck wooden bar: fundamental, two inharmonic overtones, the knock of the mallet."""
    ratios = (1, instrument.uniform(3.7, 4.1), instrument.uniform(8.8, 10.2))
    gains = (1, instrument.uniform(0.1, 0.6), instrument.uniform(0.02, 0.3))
    decay, knock = instrument.uniform(0.12, 0.4), instrument.uniform(0.2, 0.9)
    colour, detune = instrument.uniform(600, 2500), rng.normal(0, 8)
    top = score.pitches.max()

    def strike(line):
        phase = cycles(line.frequency(detune=detune), rng.random())
        mallet = band_noise(rng, len(phase), colour * 0.5, colour * 1.5)
        sound = knock * mallet * np.exp(-line.age / 0.008)
        for ratio, gain in zip(ratios, gains):
            if ratio * top < HIGHEST:
                sound += gain * sine(phase * ratio) * np.exp(-line.age * ratio**0.8 / decay)
        return line.place(sound * np.minimum(line.age / 0.001, 1) * line.velocity)

    return _ringing(score, strike)


# -- percussion --------------------------------------------------------------------------------


def drum(score, instrument, rng):
    """A drum: a skin whose pitch falls after the stroke, and rattling snares."""
    skin, drop = instrument.uniform(70, 220), instrument.uniform(0.5, 2.0)
    decay, snares = instrument.uniform(0.08, 0.3), instrument.uniform(0.05, 1.0)
    low, rattle = instrument.uniform(500, 2500), instrument.uniform(0.04, 0.18)
    line = Line(score)
    frequency = skin * (1 + drop * np.exp(-line.age / 0.03)) * line.draw(rng, 0.95, 1.06)
    sound = sine(cycles(frequency)) * line.struck(decay, 0.001)
    sound += snares * band_noise(rng, len(sound), low, 7000) * line.struck(rattle, 0.001)
    return line.place(sound * line.velocity)


def shaker(score, instrument, rng):
    """A shaker or maraca: grains that swell and stop with every stroke."""
    low, width = instrument.uniform(1500, 4500), instrument.uniform(1.3, 2.2)
    swell, grains = instrument.uniform(0.015, 0.05), instrument.uniform(300, 2000)
    line = Line(score)
    sound = band_noise(rng, len(line.age), low, low * width, 2)
    beads = rng.random(len(sound), dtype=np.float32) < grains / SAMPLE_RATE
    sound *= 0.3 + smooth(beads.astype(np.float32), 0.002) * (40 / grains * 60)
    shape = line.age / swell * np.exp(1 - line.age / swell)
    return line.place(sound * shape * line.velocity)


# -- scenes: the score gives only their length --------------------------------------------------


def bird(score, instrument, rng):
    """Birdsong: phrases of quick whistled sweeps, each phrase repeating one syllable."""
    centre, span = instrument.uniform(2200, 4800), instrument.uniform(0.15, 0.45)
    rate, wobble = instrument.uniform(5, 14), instrument.uniform(0, 0.08)
    onsets, shapes, now = [], [], rng.uniform(0, 0.4)
    while now < score.samples / SAMPLE_RATE - 0.1:
        shape = rng.uniform(-1, 1, 3)
        tempo = rate * rng.uniform(0.7, 1.4)
        for _ in range(rng.integers(3, 9)):
            onsets.append(now)
            shapes.append([*shape, 0.7 / tempo])
            now += rng.uniform(0.95, 1.05) / tempo
        now += rng.uniform(0.15, 0.7)
    ones = np.ones(len(onsets))
    line = Line(Score(score.samples, np.array(onsets), ones, ones, rng.uniform(0.5, 1, len(ones))))
    start, bend, curve, length = (line.per_note(x) for x in np.array(shapes).T)
    part = np.minimum(line.age / length, 1)
    octaves = 0.4 * start + span * 2 * (bend * (part - 0.5) + curve * (part - 0.5) ** 2 * 2)
    octaves += wobble * np.sin(2 * np.pi * 35 * line.age)
    frequency = np.clip(centre * np.exp2(octaves), 1000, HIGHEST)
    phase = cycles(frequency)
    sound = sine(phase) + 0.1 * sine(np.minimum(frequency, 3800) / frequency * phase * 2)
    return line.place(sound * np.sin(np.pi * part) ** 2 * line.velocity)


def siren(score, instrument, rng):
    """A siren: one tone that wails, yelps or alternates between two pitches."""
    low, ratio = instrument.uniform(350, 800), instrument.uniform(1.4, 2.4)
    style, rate = instrument.integers(3), instrument.uniform(0.5, 1.0)
    rate *= (1.0, 4.0, 1.5)[style] * rng.uniform(0.85, 1.15)
    turn = rng.random() + rate / SAMPLE_RATE * np.arange(score.samples)
    wave = np.abs(2 * fraction(turn) - 1)
    if style == 2:
        wave = smooth((wave > 0.5).astype(np.float32), 0.004)
    h = np.arange(1, int(HIGHEST / (low * ratio)) + 1)
    horn = (
        1
        / h ** instrument.uniform(0.8, 1.8)
        * resonances(h * low * ratio**0.5, [instrument.uniform(800, 2500)], [900], [2.0])
    )
    sound = harmonic_sound(
        cycles(low * ratio**wave), wavetables(horn[None].repeat(2, 0), rng), wave
    )
    return sound.astype(np.float32)


def engine(score, instrument, rng):
    """A combustion engine: firing pulses whose rate follows the throttle, and exhaust noise."""
    idle, rev = instrument.uniform(18, 40), instrument.uniform(0.5, 2.0)
    rough, muffler = instrument.uniform(0.05, 0.3), instrument.uniform(300, 1200)
    throttle = wander(rng, score.samples, rng.uniform(0.5, 1.5))
    firing = idle * (1 + rev * throttle)
    h = np.arange(1, 61)
    frequency = h * idle * (1 + rev / 2)
    pipe = resonances(
        frequency, instrument.uniform(60, 900, 4), instrument.uniform(40, 200, 4), [1, 1, 0.7, 0.5]
    )
    pipe = (0.1 + pipe) / (1 + (frequency / muffler) ** 2)
    uneven = rng.uniform(0.5, 1.5, (2, len(h)))
    sound = harmonic_sound(cycles(firing), wavetables(pipe * uneven, rng), throttle)
    puff = (1 - fraction(cycles(firing))) ** 3
    exhaust = band_noise(rng, score.samples, 80, muffler * 2)
    sound = sound / (sound.std() + 1e-9) + (0.3 + 3 * rough) * exhaust * puff
    return (sound * (0.4 + 0.6 * throttle)).astype(np.float32)


def water(score, instrument, rng):
    """Running water: many bubbles, each a short rising sine, over a soft hiss."""
    density, pitch = instrument.uniform(12, 60), instrument.uniform(500, 1800)
    hiss, spread = instrument.uniform(0.02, 0.12), instrument.uniform(0.4, 0.8)
    sound = hiss * band_noise(rng, score.samples, 400, 5000)
    count = int(density * score.samples / SAMPLE_RATE)
    longest = int(0.08 * SAMPLE_RATE)
    age = np.arange(longest, dtype=np.float32) / SAMPLE_RATE
    frequency = np.minimum(pitch * np.exp(rng.normal(0, spread, (count, 1))), 4500)
    decay = 8 / frequency + 0.004
    phase = frequency * (age + rng.uniform(1, 8, (count, 1)) * age**2)
    drops = np.sin((2 * np.pi * phase).astype(np.float32)) * np.exp(-age / decay)
    drops *= rng.exponential(1, (count, 1)) * np.minimum(age / 0.001, 1)
    for start, drop in zip(rng.integers(0, score.samples - longest, count), drops):
        sound[start : start + longest] += drop
    return sound


def wind(score, instrument, rng):
    """Wind: noise that howls up and down with the gusts."""
    centre, width = instrument.uniform(250, 700), instrument.uniform(0.3, 1.2)
    gusts, howl = instrument.uniform(0.7, 2.5), instrument.uniform(0.2, 0.9)
    gust = wander(rng, score.samples, gusts)
    lines = [(0.7, 1.0), (1.0, 1.0), (1.6, 0.8), (2.6, 0.5), (4.5, 0.25)]
    sound = 0.0
    for place, (ratio, gain) in enumerate(lines):
        low = centre * ratio / (1 + width / 2)
        sweep = np.exp(-((4 * gust - place) ** 2) / 2)
        band = band_noise(rng, score.samples, low, low * (1 + width))
        sound = sound + gain * band * ((1 - howl) + howl * 2 * sweep)
    return (sound * (0.15 + gust) ** 1.5).astype(np.float32)


PITCHED = {f.__name__: f for f in (plucked, bowed, flute, reed, brass, organ, voice, bell, marimba)}
PERCUSSION = {f.__name__: f for f in (drum, shaker)}
SCENES = {f.__name__: f for f in (bird, siren, engine, water, wind)}
SOUNDS = {**PITCHED, **PERCUSSION, **SCENES}
