"""From leaves to stacks of matrices to devices, and back.

`_devices.py` says what `shard_over` means.
"""

from scion_jax.distributed._devices import check_shard_over as check_shard_over
from scion_jax.distributed._devices import over_devices as over_devices
from scion_jax.distributed._stacks import Stacks as Stacks
