"""Joint-Embedding Predictive Architectures for audio, as a SpeechBrain and s3prl plugin."""

__version__ = "0.1.0"
