"""Reading programs: what each parameter is, from what the program does with it."""

from scion_jax.reading._roles import Role, read_roles

__all__ = ["Role", "read_roles"]
