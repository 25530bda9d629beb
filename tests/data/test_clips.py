import numpy as np
import pytest
import soundfile

from speechbrain_jepa.data.audio import UnreadableAudio
from speechbrain_jepa.data.clips import read_audio


@pytest.mark.parametrize("rate", [44_100, 11_127])
def test_other_rates_and_channels_become_mono_at_16_khz(tmp_path, rate):
    seconds = np.arange(rate) / rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * seconds)
    soundfile.write(tmp_path / "tone.wav", np.stack([tone, 0 * tone], 1), rate)
    wav = read_audio(tmp_path / "tone.wav").numpy()
    assert wav.dtype == np.float32 and abs(len(wav) - 16_000) <= 16  # 0.1 % for odd rates
    assert abs(np.abs(np.fft.rfft(wav)).argmax() - 440) <= 1
    assert wav[1000:-1000].std() == pytest.approx(0.25 / 2**0.5, rel=0.01)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.full(16_000, np.nan), "NaN"),
        (np.full(16_000, np.inf), "infinite"),
        (np.zeros(0), "no samples"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path, content, reason):
    soundfile.write(tmp_path / "bad.wav", content, 16_000, "FLOAT")
    with pytest.raises(UnreadableAudio, match=f"bad.wav: .*{reason}"):
        read_audio(tmp_path / "bad.wav")
