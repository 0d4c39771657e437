"""The one house for speed and memory: what restoring, generating and training take, part by part."""
