"""Reading programs: what each parameter is, from what the program does with it."""

from scion_jax.reading._norms import infer_norms as infer_norms
from scion_jax.reading._roles import Role as Role
from scion_jax.reading._roles import read_roles as read_roles
