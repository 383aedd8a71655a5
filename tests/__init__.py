"""The tests, as the package is laid out; `support` is what several of them share."""
