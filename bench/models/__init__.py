"""Networks: bodies, heads, and classifiers that grow, behind one interface (build.py names them)."""
