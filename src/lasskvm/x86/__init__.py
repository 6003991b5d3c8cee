"""What the architecture says: constants and pure functions, no state, no I/O."""
