"""Test sets: the known ones, checking that a folder is one of them, and making one."""
