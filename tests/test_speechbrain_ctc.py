"""The CTC example of docs/speechbrain.md, the very lines of the page, on speech made of tones."""

import re
from pathlib import Path

import pytest
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.batch import PaddedBatch
from torch.utils.data import DataLoader

from speechbrain_jepa.checkpoints import save_pretrained
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid

RATE = 16_000
PITCH = (300, 900, 2_100, 4_500)  # Hz, of labels 1 to 4
LETTER = 1_600  # samples, 0.1 s, and a pause of a quarter of that


@pytest.fixture(scope="module")
def example():
    """The yaml and the class that the page shows."""
    page = (Path(__file__).parents[1] / "docs" / "speechbrain.md").read_text(encoding="utf-8")
    section = page.split("### Speech recognition, CTC\n")[1].split("\n## ")[0]
    yaml, code = (
        re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)[1] for kind in ("yaml", "python")
    )
    names = {}
    exec(code, names)
    return yaml, names["CTCBrain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    encoder = Encoder(PatchGrid(frames=208), dim=24, depth=1, num_heads=3)
    return save_pretrained(tmp_path_factory.mktemp("model") / "p", encoder, Normalization(-7, 4))


def speak(labels, generator):
    parts = []
    for label in labels:
        time = torch.arange(LETTER) / RATE + torch.rand(1, generator=generator)
        parts += [0.3 * torch.sin(2 * torch.pi * PITCH[label - 1] * time), torch.zeros(LETTER // 4)]
    wav = torch.cat(parts)
    return wav + 0.003 * torch.randn(len(wav), generator=generator)


def make_loader(seed, count):
    generator = torch.Generator().manual_seed(seed)
    clips = []
    for number in range(count):
        length = int(torch.randint(4, 8, (1,), generator=generator))
        tokens = torch.randint(1, 5, (length,), generator=generator)
        sig = speak(tokens.tolist(), generator)
        clips.append({"id": str(number), "sig": sig, "tokens": tokens})
    return DataLoader(clips, batch_size=8, collate_fn=PaddedBatch)


def make_brain(example, folder, step_seconds):
    yaml, brain = example
    hparams = load_hyperpyyaml(
        yaml,
        {
            "encoder": {"source": str(folder), "step_seconds": step_seconds},
            "rnn": {"input_size": 120, "hidden_size": 32},
            "output": {"input_size": 64, "n_neurons": 5},
        },
    )
    return brain(
        modules=hparams["modules"],
        opt_class=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        hparams=hparams,
        run_opts={"device": "cpu", "noprogressbar": True},
    )


def test_it_learns_to_read(example, folder, capsys):
    torch.manual_seed(0)
    brain = make_brain(example, folder, 0.04)
    brain.fit(range(3), make_loader(0, 96))
    loss = brain.evaluate(make_loader(1, 16))
    assert brain.errors.summarize("error_rate") < 10  # of what it never heard; silence has 100
    assert loss > 0
    assert "TEST error rate: " in capsys.readouterr().out


def test_what_does_not_fit_is_refused_where_the_loss_would_be_0(example, folder):
    torch.manual_seed(0)
    brain = make_brain(example, folder, 0.16)
    (batch,) = make_loader(0, 8)
    wav_lens, (tokens, token_lens) = batch.sig.lengths, batch.tokens
    log_probs = brain.compute_forward(batch, sb.Stage.TRAIN)
    needed, steps = token_lens * tokens.shape[1], wav_lens * log_probs.shape[1]
    assert (needed > steps.round()).any()
    loss = brain.hparams.ctc_cost(log_probs, tokens, wav_lens, token_lens, reduction="batch")
    assert (loss == 0).any()  # SpeechBrain's own
    with pytest.raises(ValueError, match=r"\d labels do not fit: finer step_seconds"):
        brain.compute_objectives(log_probs, batch, sb.Stage.TRAIN)
