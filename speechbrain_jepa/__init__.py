"""Joint-Embedding Predictive Architectures for audio, as a SpeechBrain and s3prl plugin."""

__version__ = "0.1.0"
__all__ = ["AudioJEPA"]


def __getattr__(name: str):
    """Import `AudioJEPA` when it is first asked for: `import speechbrain_jepa` stays instant."""
    if name == "AudioJEPA":
        from speechbrain_jepa.encoder import AudioJEPA

        return AudioJEPA
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
