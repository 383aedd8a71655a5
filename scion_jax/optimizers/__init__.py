"""The optimizers: each a chain to be read aloud, gradient to step.

They average gradients, ask each layer's norm ball for its extreme point along the average (the
LMO), and move towards its opposite; ALMOND asks first and averages then. The step length is the
learning rate times the radius, never the size of the gradient: hence no Adam for the odd layers, no
warm-up, and a learning rate that carries over to wider models.
"""

from scion_jax.optimizers._almond import almond as almond
from scion_jax.optimizers._clipped import clipped_scion as clipped_scion
from scion_jax.optimizers._clipped import unconstrained_clipped_scion as unconstrained_clipped_scion
from scion_jax.optimizers._light import scion_light as scion_light
from scion_jax.optimizers._scion import scion as scion
from scion_jax.optimizers._scion import unconstrained_scion as unconstrained_scion
