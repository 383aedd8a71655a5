"""What does not work yet: patterns of test names, with the issue that settles them."""

PENDING: dict[str, str] = {}
