"""Order, seeding and loading of data."""
