"""Polar factors of stacks of matrices: the iteration, its coefficients, and bounds."""

from scion_jax.polar._bound import spectral_norm_bound as spectral_norm_bound
from scion_jax.polar._coefficients import with_safety as with_safety
from scion_jax.polar._orthogonalizers import ExactPolar as ExactPolar
from scion_jax.polar._orthogonalizers import NewtonSchulz as NewtonSchulz
from scion_jax.polar._orthogonalizers import Orthogonalizer as Orthogonalizer
from scion_jax.polar._orthogonalizers import check_orthogonalizer as check_orthogonalizer
from scion_jax.polar._orthogonalizers import orthogonalize as orthogonalize
