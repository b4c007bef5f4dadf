"""Checkpoints: safetensors and JSON only, complete and verified or not there."""
