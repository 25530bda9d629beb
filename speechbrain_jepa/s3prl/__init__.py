"""`audio_jepa` as an upstream of s3prl (docs/s3prl.md).

Importing this package is enough: the entries are on `s3prl.hub` as soon as that is imported,
before or after.

>>> import speechbrain_jepa.s3prl
"""

from speechbrain_jepa.s3prl.registration import install

install()
