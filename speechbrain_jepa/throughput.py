"""Where the time of a run over files went, and what holds it up."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

STAGES = {  # what a run does in turns, and what makes each quicker
    "reading": "waiting for files to be read and decoded: more --num_workers, or more CPUs, or a "
    "corpus decoded once (python -m speechbrain_jepa.prepare)",
    "encoding": "the encoder: a GPU, more of them, or --precision bf16",
    "writing": "writing: a faster disk under --out",
}


@dataclass
class Spent:
    """Seconds of each stage of embedding files.

    Arguments
    ---------
    files : int
        That were embedded.
    audio : float
        Seconds in them.
    reading, encoding, writing : float
        Seconds in which nothing else was done.
    whole : float
        Seconds from beginning to end, those of all processes together.
    processes : int

    Example
    -------
    >>> spent = Spent(files=900, audio=9000, reading=41.0, encoding=15.0, writing=1.0, whole=60.0)
    >>> print(spent.sentence())  # doctest: +ELLIPSIS
    900 files, 2.5 hours of audio in 1.0 minutes; bottleneck, 68 % of the time: waiting for files...
    """

    files: int = 0
    audio: float = 0.0
    reading: float = 0.0
    encoding: float = 0.0
    writing: float = 0.0
    whole: float = 0.0
    processes: int = 1

    @contextmanager
    def on(self, stage: str) -> Iterator[None]:
        """Add the time within to a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - began)

    def sum_of(self, processes: "list[Spent]") -> None:
        """Become what several processes spent together."""
        for name in asdict(self):
            setattr(self, name, sum(getattr(process, name) for process in processes))

    def sentence(self) -> str:
        """What was done, and the stage that took longest."""
        done = f"{self.files} files, {self.audio / 3600:.1f} hours of audio"
        stage = max(STAGES, key=lambda name: getattr(self, name))
        if not self.files or not self.whole:
            return f"{done} in this run"
        each = f", {self.processes} processes" if self.processes > 1 else ""
        return (
            f"{done} in {self.whole / 60 / self.processes:.1f} minutes{each}; bottleneck, "
            f"{100 * getattr(self, stage) / self.whole:.0f} % of the time: {STAGES[stage]}"
        )
