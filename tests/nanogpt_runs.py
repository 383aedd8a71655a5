"""What the tests of `examples/nanogpt.py` have in common: a text, and less to compile."""

from examples import nanogpt


def write_book(path):
    """Writes 20,000 bytes that are easy to learn, and returns the path."""
    path.write_text("".join(f"line {number % 37} of the book\n" for number in range(1000)))
    return path


def one_optimizer(context):
    """Gives all runs of a model the same optimizer, so that steps are compiled once."""

    def unconstrained_scion(schedule, norms):
        return optimizers.setdefault(norms, original(schedule, norms))

    optimizers, original = {}, nanogpt.scion_jax.unconstrained_scion
    context.setattr(nanogpt.scion_jax, "unconstrained_scion", unconstrained_scion)
