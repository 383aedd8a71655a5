"""What does not work yet: patterns of test names, with the issue that settles them."""

PENDING = {
    # The stack of the short step's bounds; the stack of pairings of several meshes.
    r"test_a_compiled_step_takes_its_own_output\[short_step": "issue 23, K",
    r"test_several_meshes_in_one_tree\[Explicit \w+-short_step": "issue 23, K",
    r"test_every_optimizer_refuses\[.*no array.\*eqx.filter": "issue 22: refused before eval_shape",
}
