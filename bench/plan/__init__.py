"""From protocols, methods and seeds to jobs with content keys. It imports no torch."""
