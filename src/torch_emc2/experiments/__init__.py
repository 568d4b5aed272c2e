"""Experiments by name: the paper's figures and ours, on any data set of the library.

Settings of data sets are the YAML files in ``presets``.
"""
