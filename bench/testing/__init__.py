"""For plug-in authors and for our own tests."""
