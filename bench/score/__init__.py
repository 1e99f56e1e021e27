"""From confusion counts to numbers: pure functions of numpy arrays."""
