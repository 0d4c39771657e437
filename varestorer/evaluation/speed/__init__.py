"""How fast restoring and generation are, stage by stage, beside what the device could do."""
