"""Training a classifier with its encoder on labelled audio: recipes/finetuning, event_detection."""
