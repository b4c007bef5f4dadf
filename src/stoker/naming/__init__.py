"""What the parts of a model are called, in files and in messages."""
