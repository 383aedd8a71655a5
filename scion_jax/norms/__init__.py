"""Norm balls, each with its linear minimization oracle, gauge, dual norm and initializer."""

from scion_jax.norms._auto import Auto as Auto
from scion_jax.norms._auto import at_rank as at_rank
from scion_jax.norms._axes import Axes as Axes
from scion_jax.norms._base import Norm as Norm
from scion_jax.norms._layout import Layout as Layout
from scion_jax.norms._layout import possible_layouts as possible_layouts
from scion_jax.norms._lmos import Leaf as Leaf
from scion_jax.norms._lmos import gauge_bounds as gauge_bounds
from scion_jax.norms._lmos import lmos as lmos
from scion_jax.norms._normalized import BiasRMS as BiasRMS
from scion_jax.norms._normalized import ColNorm as ColNorm
from scion_jax.norms._normalized import Euclidean as Euclidean
from scion_jax.norms._normalized import RowNorm as RowNorm
from scion_jax.norms._sign import Sign as Sign
from scion_jax.norms._spectral import Spectral as Spectral
from scion_jax.norms._spectral import SpectralConv as SpectralConv
