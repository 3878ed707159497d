"""The ops inside mergekit, PEFT and FusionBench; each module here imports its toolkit, and nothing imports it."""
