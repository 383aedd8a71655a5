"""Norm balls, each with its linear minimization oracle, gauge, dual norm and initializer."""

from scion_jax.norms.auto import Auto as Auto
from scion_jax.norms.base import Norm as Norm
from scion_jax.norms.euclidean import BiasRMS as BiasRMS
from scion_jax.norms.euclidean import Euclidean as Euclidean
from scion_jax.norms.rows_and_columns import ColNorm as ColNorm
from scion_jax.norms.rows_and_columns import RowNorm as RowNorm
from scion_jax.norms.sign import Sign as Sign
from scion_jax.norms.spectral import Spectral as Spectral
from scion_jax.norms.spectral import SpectralConv as SpectralConv
