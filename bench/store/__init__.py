"""The results folder: typed records, whole files, locks. It knows neither torch nor methods."""
