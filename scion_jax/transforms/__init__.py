"""The stages that optimizers are made of, each an Optax gradient transformation."""

from scion_jax.transforms._average import average_gradients as average_gradients
from scion_jax.transforms._average import blend as blend
from scion_jax.transforms._average import remember as remember
from scion_jax.transforms._chain import chain as chain
from scion_jax.transforms._chain import descend as descend
from scion_jax.transforms._clip import clip_by_pairing as clip_by_pairing
from scion_jax.transforms._lmo import decay_weights as decay_weights
from scion_jax.transforms._lmo import scale_by_lmo as scale_by_lmo
from scion_jax.transforms._rounding import buffer_dtypes as buffer_dtypes
from scion_jax.transforms._rounding import store as store
from scion_jax.transforms._shardings import with_shardings as with_shardings
