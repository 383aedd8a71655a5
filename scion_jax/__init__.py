"""Optimizers based on linear minimization oracles over norm balls, for JAX and Optax.

[S] Pethick et al., *Training Deep Learning Models with Norm-Constrained LMOs*, ICML 2025,
arXiv:2502.07529.
[C] Pethick et al., *Generalized Gradient Norm Clipping & Non-Euclidean (L0,L1)-Smoothness*, NeurIPS
2025, arXiv:2506.01913.
"""

from scion_jax._assignment import Assignment as Assignment
from scion_jax._labels import label_by_path as label_by_path
from scion_jax.activations import scaled_gelu as scaled_gelu
from scion_jax.activations import scaled_relu as scaled_relu
from scion_jax.activations import scaled_relu_squared as scaled_relu_squared
from scion_jax.description import describe as describe
from scion_jax.diagnostics import dual_norm as dual_norm
from scion_jax.diagnostics import frank_wolfe_gap as frank_wolfe_gap
from scion_jax.diagnostics import gauge_bounds as gauge_bounds
from scion_jax.diagnostics import gauges as gauges
from scion_jax.diagnostics import pairings as pairings
from scion_jax.initialization import init_params as init_params
from scion_jax.norms import Auto as Auto
from scion_jax.norms import BiasRMS as BiasRMS
from scion_jax.norms import ColNorm as ColNorm
from scion_jax.norms import Euclidean as Euclidean
from scion_jax.norms import Norm as Norm
from scion_jax.norms import RowNorm as RowNorm
from scion_jax.norms import Sign as Sign
from scion_jax.norms import Spectral as Spectral
from scion_jax.norms import SpectralConv as SpectralConv
from scion_jax.optimizers import almond as almond
from scion_jax.optimizers import clipped_scion as clipped_scion
from scion_jax.optimizers import scion as scion
from scion_jax.optimizers import scion_light as scion_light
from scion_jax.optimizers import unconstrained_clipped_scion as unconstrained_clipped_scion
from scion_jax.optimizers import unconstrained_scion as unconstrained_scion
from scion_jax.polar import ExactPolar as ExactPolar
from scion_jax.polar import NewtonSchulz as NewtonSchulz
from scion_jax.polar import orthogonalize as orthogonalize
from scion_jax.reading import infer_norms as infer_norms
from scion_jax.transforms import average_gradients as average_gradients
from scion_jax.transforms import clip_by_pairing as clip_by_pairing
from scion_jax.transforms import decay_weights as decay_weights
from scion_jax.transforms import scale_by_lmo as scale_by_lmo
from scion_jax.transforms import with_shardings as with_shardings

__version__ = "0.1.0"
