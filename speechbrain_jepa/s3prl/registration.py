"""Adding the entries to `s3prl.hub` without editing it, and without importing s3prl first.

`install` puts a finder at the front of `sys.meta_path`, which acts on two modules only: before
`s3prl` runs, the compat module supplies what today's packages lack, and after `s3prl.hub` has run,
it is given the entries. In the processes that a script of s3prl starts it acts on `torchaudio` too:
they read audio without importing s3prl.
"""

import sys

COMPAT = f"{__package__}.compat"


def install(torchaudio: bool = False) -> None:
    """Register the entries now, or when s3prl is imported; a second call does nothing.

    Arguments
    ---------
    torchaudio : bool
        Supply what today's packages lack as soon as torchaudio has been imported. Default False.
    """
    _finder.torchaudio |= torchaudio
    if "s3prl" in sys.modules:
        _supply()
    if "s3prl.hub" in sys.modules:
        _register(sys.modules["s3prl.hub"])
    elif _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


class _Finder:
    """Finds s3prl through the other finders, and acts before and after it is executed."""

    torchaudio = False  # whether to act on that, too

    def find_spec(self, name, path=None, target=None):
        watched = ("s3prl", "s3prl.hub", *(("torchaudio", COMPAT) if self.torchaudio else ()))
        if name not in watched:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is None or spec.origin is None:  # not installed, or a folder of that name
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            if name == "s3prl":
                _supply()
            execute(module)
            if name == "s3prl.hub":
                _register(module)
            elif name == "torchaudio" and COMPAT not in sys.modules:  # which imports it
                _supply()
            elif name == COMPAT:
                module.supply()

        spec.loader.exec_module = exec_module
        return spec


_finder = _Finder()


def _supply() -> None:
    from speechbrain_jepa.s3prl import compat

    compat.supply()


def _register(hub) -> None:
    from speechbrain_jepa.s3prl import hubconf

    for name in hubconf.__all__:
        setattr(hub, name, getattr(hubconf, name))
