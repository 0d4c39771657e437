"""Where weights come from: published files, bundles, runs; import from the modules, this one stays light."""

DEFAULT = "nano"
"""The model that restores where no other is named."""
