"""The result on disk: its shards, the files beside them, and what makes it complete or not there."""
