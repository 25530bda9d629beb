"""A classifier of clips or of time steps: an `AudioJEPA`, a head, and the labels it was trained on.

Shapes: B clips, T time steps, F frequency patches, D dims, C = F * D dims of a time step, K labels.

Its folder is a pretrained folder, which `AudioJEPA` loads, with two files beside:

    classifier.json         labels, level, head, how scores become events
    classifier.safetensors  the head
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from speechbrain_jepa.checkpoints import CARD, FILES, find_folder, save_pretrained
from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.files import whole_folder
from speechbrain_jepa.untrusted import read_json, read_safetensors, short

FORMAT_VERSION = 1
CLASSIFIER = "classifier.json"
HEAD = "classifier.safetensors"
LEVELS = ("clip", "step")
POOLINGS = ("mean", "attention")
NORMS = ("batch", "layer", "none")
HEAD_STD = 0.01  # of the linear layers at the start, as in M2D's fine-tuning
MAX_LABELS = 2**20

CARD_TEXT = """
## Classifier

Beside the encoder this folder has a classifier of {what}, fine-tuned on labels. It is applied by

```
python -m speechbrain_jepa.tag FOLDER files or folders --out labels.csv
```

Labels: {labels}
"""


class Logits(NamedTuple):
    """What a classifier gives.

    Arguments
    ---------
    clip : Tensor [B, K], float32, or None
        None for level="step" without attention pooling.
    steps : Tensor [B, T, K], float32, or None
        None with mean pooling, which has no scores in time.
    present : Tensor [B, T], bool
        Steps that count: a clip's own, and not dropped in training.
    """

    clip: Tensor | None
    steps: Tensor | None
    present: Tensor


@dataclass(frozen=True)
class Decoding:
    """How the scores of time steps become events.

    Arguments
    ---------
    thresholds : list of float
        Of each label; empty: 0.5.
    median_seconds : float
        Window of the median filter over the scores; 0: none. Default 0.
    """

    thresholds: list[float] = field(default_factory=list)
    median_seconds: float = 0.0


class AudioClassifier(nn.Module):
    """Labels of clips, or of time steps.

    Arguments
    ---------
    encoder : AudioJEPA
        With one layer as output. `freeze=False` fine-tunes it.
    labels : list of str
        K of them.
    multilabel : bool
        A clip may have any number of labels: scores are sigmoids, each on its own. Default False:
        a softmax over them. Always True for level="step".
    level : str
        "clip" (default), or "step": labels of each time step, for events.
    pooling : str or None
        "mean" (default for clips): the mean over a clip's time steps goes through the linear
        layer. "attention": logits of each step, averaged with weights that a second linear layer
        gives each step and label, normalised over time (Kong et al., "PANNs", 2020, and the
        attention pooling of DCASE task 4's baseline; here logits are averaged, not
        probabilities, so that a softmax over labels can follow). Level "step" has no clip scores
        with None (its default), and those of the attention pooling beside its steps' with
        "attention".
    flat : bool
        Average the F frequency patches as well. Default False: they are concatenated.
    norm : str
        In front of the linear layer: "batch" (default, without affine parameters, as M2D and MAE
        have it), "layer" (as EAT) or "none".
    dropout : float
        Of what enters the linear layer. Default 0.
    decoding : Decoding or None
        For level="step".

    Raises
    ------
    ValueError
        If an option does not fit.

    Example
    -------
    >>> from speechbrain_jepa.features import Normalization
    >>> from speechbrain_jepa.vit import Encoder, PatchGrid
    >>> parts = Encoder(PatchGrid(), dim=48, depth=1, num_heads=3), Normalization(-7.06, 4.19)
    >>> model = AudioClassifier(AudioJEPA(parts, freeze=False), ["cat", "dog", "rain"]).eval()
    >>> model(torch.randn(2, 48_000), torch.tensor([1.0, 0.5])).clip.shape
    torch.Size([2, 3])
    >>> model = AudioClassifier(AudioJEPA(parts, step_seconds=0.04), ["cat", "dog"], level="step")
    >>> model(torch.randn(2, 48_000)).steps.shape
    torch.Size([2, 75, 2])
    """

    def __init__(
        self,
        encoder: AudioJEPA,
        labels: list[str],
        multilabel: bool = False,
        level: str = "clip",
        pooling: str | None = None,
        flat: bool = False,
        norm: str = "batch",
        dropout: float = 0.0,
        decoding: Decoding | None = None,
    ):
        super().__init__()
        if level == "clip" and pooling is None:
            pooling = "mean"
        for name, value, choices in (
            ("level", level, LEVELS),
            ("pooling", pooling, POOLINGS if level == "clip" else (None, "attention")),
            ("norm", norm, NORMS),
        ):
            if value not in choices:
                raise ValueError(
                    f"{name}={value!r} (level={level!r}): choose one of "
                    f"{', '.join(map(str, choices))}"
                )
        if len(labels) < 1 or len(set(labels)) < len(labels):
            raise ValueError(f"labels={short(labels)}: at least one is needed, and none twice")
        plain = not (encoder.output_all_hiddens or encoder.flat or encoder.output_norm)
        if not plain or encoder.step_layers != [encoder.num_layers - 1]:
            raise ValueError(
                "the classifier's encoder gives its last layer as it is: without "
                "output_all_hiddens, layers, flat and output_norm"
            )
        self.encoder = encoder
        self.labels = list(labels)
        self.multilabel = multilabel or level == "step"
        self.level = level
        self.pooling = pooling
        self.flat = flat
        self.norm_name = norm
        self.decoding = decoding or Decoding()
        dim = encoder.encoder.dim if flat else encoder.get_output_dim()
        self.head = nn.ModuleDict({"linear": nn.Linear(dim, len(labels))})
        if norm == "batch":
            self.head["norm"] = nn.BatchNorm1d(dim, affine=False)
        if norm == "layer":
            self.head["norm"] = nn.LayerNorm(dim, eps=1e-6)
        if pooling == "attention":
            self.head["attention"] = nn.Linear(dim, len(labels))
        for layer in self.head.values():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=HEAD_STD)
                nn.init.zeros_(layer.bias)
        self.dropout = nn.Dropout(dropout)
        self.to(encoder.encoder.patch_embed.weight.device)

    def forward(self, wav: Tensor, wav_lens: Tensor | None = None) -> Logits:
        """
        Arguments
        ---------
        wav : Tensor [B, samples], floating
            Mono, 16 kHz.
        wav_lens : Tensor [B] or None
            Lengths over that of the batch. None: all 1.

        Returns
        -------
        Logits
        """
        steps = self.encoder(wav, wav_lens)
        with torch.autocast(steps.device.type, enabled=False):
            tokens = steps.float().unflatten(-1, (self.encoder.encoder.grid.frequency_patches, -1))
            # what is no step of the clip's own, or was dropped, is all zeros
            there = tokens.ne(0).any(-1)  # [B, T, F]
            present = there.any(-1)
            if self.pooling == "mean":
                axes = (1, 2) if self.flat else 1
                count = there.sum(axes).clamp(min=1)[..., None]
                pooled = (tokens.sum(axes) / count).flatten(1)
                return Logits(self.head["linear"](self._normalized(pooled)), None, present)
            features = tokens.mean(2) if self.flat else tokens.flatten(2)
            own = self._normalized(features[present])  # statistics of steps that count alone
            logits = _spread(self.head["linear"](own), present)
            if self.pooling is None:
                return Logits(None, logits, present)
            weights = _spread(self.head["attention"](own), present)
            weights = weights.masked_fill(~present[..., None], -torch.inf).softmax(1)
            return Logits((weights * logits).sum(1), logits, present)

    def _normalized(self, features: Tensor) -> Tensor:
        if "norm" in self.head:
            features = self.head["norm"](features)
        return self.dropout(features)

    def scores(self, logits: Tensor) -> Tensor:
        """Logits [..., K] as scores from 0 to 1: sigmoids, or with one label a clip a softmax."""
        return logits.sigmoid() if self.multilabel else logits.softmax(-1)

    # On the disk

    def save(self, folder, training: dict | None = None) -> Path:
        """Write the folder, whole or not at all; one of a classifier that is there is replaced.

        Arguments
        ---------
        folder : str or Path
        training : dict or None
            How it was fine-tuned, in whatever JSON can say: goes into config.json.

        Returns
        -------
        Path

        Raises
        ------
        FileExistsError
            If `folder` holds anything but such a folder.
        ValueError
            If a weight is NaN or infinite.
        """
        folder = Path(folder)
        _check_replaceable(folder)
        state = {
            name: part.detach().cpu().contiguous() for name, part in self._head_state().items()
        }
        broken = [name for name, part in state.items() if not part.isfinite().all()]
        if broken:
            raise ValueError(f"{folder}: {broken[0]} of the head holds NaN or infinity")
        encoder = self.encoder
        config = {
            "format_version": FORMAT_VERSION,
            "labels": self.labels,
            "multilabel": self.multilabel,
            "level": self.level,
            "pooling": self.pooling,
            "flat": self.flat,
            "norm": self.norm_name,
            "step_seconds": encoder.step_seconds,
            "normalization": "instance" if encoder.normalize == "instance" else "pretraining",
            "decoding": asdict(self.decoding),
        }
        facts = {**encoder.description["training"], **(training or {})}
        parts = (encoder.encoder, encoder.normalization, facts, encoder.read_out, encoder.features)
        with whole_folder(folder) as partial:
            save_pretrained(partial, *parts)
            text = json.dumps(config, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
            (partial / CLASSIFIER).write_text(text, encoding="utf-8")
            save_file(state, partial / HEAD, metadata={"format": "pt"})
            (partial / HEAD).chmod((partial / CLASSIFIER).stat().st_mode)
            what = "clips" if self.level == "clip" else f"time steps of {encoder.step_seconds:g} s"
            with open(partial / CARD, "a", encoding="utf-8") as card:
                card.write(CARD_TEXT.format(what=what, labels=", ".join(self.labels)))
            _check_replaceable(folder)
        return folder

    @classmethod
    def load(cls, source, save_path=None, device=None) -> "AudioClassifier":
        """Load a classifier's folder: JSON and safetensors, no code. Frozen, in eval mode.

        Arguments
        ---------
        source : str or Path
            The folder, or a Hugging Face repo id.
        save_path : str or Path or None
            Where a repo is cached. Default: huggingface_hub's own cache.
        device : str or torch.device or None
            Default: the CPU.

        Returns
        -------
        AudioClassifier

        Raises
        ------
        FileNotFoundError, ValueError
            If it is no such folder, or a file is not what it should be.
        """
        folder = find_folder(source, save_path, allow_patterns=[*FILES, CLASSIFIER, HEAD])
        for name in (CLASSIFIER, HEAD):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {name}: it is an encoder without a classifier, which "
                    "recipes/finetuning and recipes/event_detection train"
                )
        config = _checked(folder / CLASSIFIER, read_json(folder / CLASSIFIER))
        weights = read_safetensors(folder / HEAD)
        rows = weights.shapes.get("linear.weight", (0,))[0]
        if rows != len(config["labels"]):  # before memory is allocated for them
            raise ValueError(
                f"{weights.path} is the head of {rows} labels, {CLASSIFIER} names "
                f"{len(config['labels'])}: export it again"
            )
        try:
            encoder = AudioJEPA(
                folder,
                normalization=config.pop("normalization"),
                step_seconds=config.pop("step_seconds"),
                device=device,
            )
            decoding = Decoding(**config.pop("decoding"))
            model = cls(encoder, **config, decoding=decoding)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder}: no classifier can be built ({error})") from error
        shapes = {name: tuple(part.shape) for name, part in model._head_state().items()}
        if weights.shapes != shapes:
            raise ValueError(
                f"{weights.path}: the head has the parameters {short(weights.shapes)}, "
                f"{CLASSIFIER} asks for {short(shapes)}: export it again"
            )
        state = weights.load()
        for name, part in state.items():
            if not part.isfinite().all():
                raise ValueError(f"{weights.path}: {name} holds NaN or infinity")
        model.head.load_state_dict(state, strict=False)  # without batch norm's counter
        return model.eval().requires_grad_(False)

    def _head_state(self) -> dict[str, Tensor]:
        state = self.head.state_dict()
        return {name: part for name, part in state.items() if part.is_floating_point()}


def _spread(rows: Tensor, present: Tensor) -> Tensor:
    """Rows [steps, K] of the steps that count at their places [B, T, K], zeros elsewhere."""
    out = rows.new_zeros(*present.shape, rows.shape[-1])
    return out.masked_scatter(present[..., None], rows)


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name another folder")
    known = (*FILES, CLASSIFIER, HEAD)
    strange = sorted(path.name for path in folder.iterdir() if path.name not in known)
    if strange:
        raise FileExistsError(
            f"{folder} holds {', '.join(strange[:3])}, which is no part of a classifier: name "
            "another folder, or empty this one"
        )


def _checked(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The content of classifier.json without its version, each value of its type."""
    config = dict(config)
    version = config.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {short(version)}, this version of speechbrain-jepa reads "
            f"{FORMAT_VERSION}: update the package, or export again"
        )
    kinds = {
        "labels": list,
        "multilabel": bool,
        "level": str,
        "pooling": str | None,
        "flat": bool,
        "norm": str,
        "step_seconds": float,
        "normalization": str,
        "decoding": dict,
    }
    for name, kind in kinds.items():
        if name not in config or not isinstance(config[name], kind):
            raise ValueError(f"{path}: {name}={short(config.get(name))} is missing or no {kind}")
    for name in config:
        if name not in kinds:
            raise ValueError(f"{path}: {short(name)} is unknown")
    labels, decoding = config["labels"], config["decoding"]
    if not all(isinstance(label, str) for label in labels) or not 1 <= len(labels) <= MAX_LABELS:
        raise ValueError(f"{path}: labels={short(labels)}: expected 1 to {MAX_LABELS} names")
    thresholds, median = decoding.get("thresholds"), decoding.get("median_seconds")
    numbers = [*thresholds, median] if isinstance(thresholds, list) else [None]
    if set(decoding) != {"thresholds", "median_seconds"} or not (
        all(isinstance(number, float | int) and 0 <= number <= 1e6 for number in numbers)
        and len(thresholds) in (0, len(labels))
    ):
        raise ValueError(
            f"{path}: decoding={short(decoding)}: expected thresholds, one for each label or none, "
            "and median_seconds"
        )
    return config
