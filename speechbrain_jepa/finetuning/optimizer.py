"""Learning rates that fall from the last layer to the first."""

from torch import nn

from speechbrain_jepa.classifier import AudioClassifier


def layerwise_groups(
    model: AudioClassifier, layer_decay: float = 1.0, decay_vectors: bool = False
) -> list[dict]:
    """Parameter groups for an optimiser, each with its `lr_scale`.

    The head and the encoder's final norm are at 1, layer i of n at layer_decay ** (n + 1 - i),
    the patch embedding is layer 0 (Clark et al., "ELECTRA", 2020; as in BEiT, MAE and EAT).

    Arguments
    ---------
    model : AudioClassifier
    layer_decay : float
        From above 0 to 1. Default 1: all learn at one rate.
    decay_vectors : bool
        Weight decay on biases and norms too. Default False.

    Returns
    -------
    list of dict
        params, lr_scale, and weight_decay=0 for the vectors. Frozen parameters are in none.

    Raises
    ------
    ValueError
        If `layer_decay` is out of range, or nothing is to be trained.

    Example
    -------
    >>> from speechbrain_jepa.encoder import AudioJEPA
    >>> from speechbrain_jepa.features import Normalization
    >>> from speechbrain_jepa.vit import Encoder, PatchGrid
    >>> parts = Encoder(PatchGrid(), dim=48, depth=2, num_heads=3), Normalization(-7.06, 4.19)
    >>> model = AudioClassifier(AudioJEPA(parts, freeze=False), ["cat", "dog"])
    >>> groups = layerwise_groups(model, layer_decay=0.5)
    >>> sorted({group["lr_scale"] for group in groups})  # patches, two layers, head
    [0.125, 0.25, 0.5, 1.0]
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay={layer_decay}: must be above 0 and at most 1")
    depth = len(model.encoder.encoder.blocks)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = layer_decay ** (depth + 1 - _layer(name, depth))
            decays = decay_vectors or parameter.dim() > 1
            groups.setdefault((scale, decays), []).append(parameter)
    if not groups:
        raise ValueError("every parameter of the classifier is frozen: there is nothing to train")
    return [
        {"params": parameters, "lr_scale": scale, **({} if decays else {"weight_decay": 0.0})}
        for (scale, decays), parameters in groups.items()
    ]


def _layer(name: str, depth: int) -> int:
    """0 for the patch embedding, 1 to depth for the layers, depth + 1 for what follows."""
    parts = name.split(".")
    if parts[:2] != ["encoder", "encoder"] or parts[2] == "norm":
        return depth + 1
    return int(parts[3]) + 1 if parts[2] == "blocks" else 0
