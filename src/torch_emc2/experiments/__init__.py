"""Experiments by name; their settings are the YAML files in ``presets``."""
