"""One module for each data set: what it is (`TASK`) and how to list its clips (`prepare`).

    from prepare import esc50

    manifest = esc50.prepare("/data/ESC-50-master", "results/esc50")

A manifest is a CSV with the columns ID, wav, duration, label, split, fold, as
`speechbrain_jepa.evaluation.labelled.read_labelled` takes it. `common` is what they share.
"""

TASKS = (
    *("esc50", "urbansound8k", "speech_commands", "voxceleb1"),
    *("cremad", "gtzan", "nsynth", "surge"),
)  # the paper's, in its order; `custom` is any other
