"""What a model does: its summary, its statistics, and where it goes wrong."""
