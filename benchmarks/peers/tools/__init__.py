"""One module a tool; `worker` says what it must have."""
