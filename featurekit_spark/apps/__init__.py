"""Applications, built on the public API alone. Each is an example to start one's own from."""
