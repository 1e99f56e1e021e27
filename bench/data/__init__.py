"""Data sets: what is known of them, where their files lie, and how images become batches."""
